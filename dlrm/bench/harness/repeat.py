"""What the cases of single kernels share: turns that call a function some times."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from dlrm.bench.harness.flags import WARM_UP_STEPS
from dlrm.bench.harness.workers import Turn
from dlrm.errors import ConfigError
from dlrm.kernels.native import load_native


def require_kernels() -> None:
    """Loads the compiled operators.

    Raises:
        ConfigError: if there are none to measure.
    """
    if (why := load_native()) is not None:
        raise ConfigError(f"no compiled operators to measure: {why}")


def repeat(call: Callable[[int], object], steps: int) -> Turn:
    """A turn that calls with 0, 1, 2, ... and gives the seconds of each call after those that warm up."""

    def take() -> Sequence[float]:
        ends = []
        for number in range(WARM_UP_STEPS + steps):
            call(number)
            ends.append(time.perf_counter())
        return [stop - start for start, stop in pairwise(ends[WARM_UP_STEPS - 1 :])]

    return take
