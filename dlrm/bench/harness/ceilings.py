"""What this machine can do, measured between the turns of a comparison, on all cores."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from dlrm.bench.harness.floor import Ceilings
from dlrm.bench.harness.workers import Side, Turns

CEILINGS = "ceilings"
_SIZES = (1024, 2048, 4096)
_COPIED_BYTES = 256 << 20
_SECONDS = 0.4
_OF_FP32 = {"int16": 2, "int8": 4}


@contextmanager
def open_ceilings(precisions: Sequence[str]) -> Iterator[Turns]:
    """A side whose one turn gives the best operations a second of a square product, and bytes a second of a copy.

    The best of several sizes, and of all precisions: a CPU without bf16 units multiplies faster in fp32. Integers have
    no such product in torch: an instruction multiplies twice (int16) or four times (int8) as many numbers as in fp32.
    """
    source, target = torch.ones(_COPIED_BYTES // 4), torch.zeros(_COPIED_BYTES // 4)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}

    def measure() -> Ceilings:
        rates = {name: matrix_rate(dtypes[name]) for name in precisions if name in dtypes}
        rates |= {name: times * rates["fp32"] for name, times in _OF_FP32.items() if name in precisions}
        # A copy reads and writes.
        return Ceilings(max(rates.values()), 2 * _COPIED_BYTES / best_seconds(lambda: target.copy_(source)))

    yield {"measure": measure}


def matrix_rate(
    dtype: torch.dtype,
    timed: Callable[[Callable[[], object]], float] | None = None,
    sizes: Sequence[int] | None = None,
) -> float:
    """Floating point operations a second of a product of two square matrices, as large as this machine makes short.

    Args:
        timed: seconds of a call; None for `best_seconds`.
        sizes: to choose from; None for those that suit a process with all cores.
    """
    timed = timed or best_seconds
    rates = []
    for size in sizes or _SIZES:
        left, right = torch.rand(2, size, size).to(dtype)
        out = torch.empty_like(left)
        seconds = timed(lambda: torch.mm(left, right, out=out))  # noqa: B023 - called before the loop goes on
        rates.append(2 * size**3 / seconds)
        if seconds > _SECONDS / 8:
            break
    return max(rates)


def best_seconds(call: Callable[[], object]) -> float:
    """The fastest of as many calls as a short while holds, two at the least."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < _SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def ceilings_side(precision: str) -> Side:
    """The side for work in this precision."""
    return Side(CEILINGS, open_ceilings, (sorted({"fp32", precision}),), ("measure",), has_group=False, is_plain=True)
