"""The cost model's free numbers, fitted to measured steps, and how far off it is on shapes the fit has not seen."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace

import numpy as np
import numpy.typing as npt

from dlrm.cost.hardware import ASSUMED_EFFICIENCY, ClusterShape, Hardware
from dlrm.cost.step import Step, StepWorkload, build_step
from dlrm.plan.forecast import reached

Vector = npt.NDArray[np.float64]

_MOST_STEPS = 80
_NUDGE = 1e-4
"""Of a logarithm, for a slope."""

_SMALLEST_GAIN = 1e-10


@dataclass(frozen=True)
class Knobs:
    """What is fitted. Efficiencies are shares of measured peak numbers.

    Attributes:
        launch_factor: times the measured time of an operator that has nothing to do.
        latency_factor: times the measured time of an all-to-all of no bytes.
    """

    matrix_efficiency: float
    memory_efficiency: float
    network_efficiency: float
    launch_factor: float
    latency_factor: float

    def on(self, peak: Hardware) -> Hardware:
        """The hardware that is reckoned with."""
        return replace(
            peak,
            matrix_efficiency=self.matrix_efficiency,
            memory_efficiency=self.memory_efficiency,
            network_efficiency=self.network_efficiency,
            launch_seconds=peak.launch_seconds * self.launch_factor,
            collective_seconds=peak.collective_seconds * self.latency_factor,
        )


_START = Knobs(ASSUMED_EFFICIENCY, ASSUMED_EFFICIENCY, ASSUMED_EFFICIENCY, 10.0, 1.0)
_LEAST = Knobs(0.02, 0.02, 0.02, 0.1, 0.01)
_MOST = Knobs(1.0, 1.0, 1.0, 1e4, 1e3)
"""An efficiency is a share; factors are free within reason."""


@dataclass(frozen=True)
class Sample:
    """A shape at a number of ranks: what its step does, and how long it took.

    Attributes:
        seconds: the median.
        peak: measured, with every rank at work.
    """

    case: str
    load: StepWorkload
    shape: ClusterShape
    peak: Hardware
    seconds: float

    def step(self, knobs: Knobs) -> Step:
        """As `dlrm plan` expects it."""
        return expected_step(self.load, self.shape, knobs.on(self.peak))


def expected_step(load: StepWorkload, shape: ClusterShape, hardware: Hardware) -> Step:
    """The cost model's step, in fp32."""
    return build_step(load, *reached(hardware, shape, "fp32"))


def fit(samples: Sequence[Sample]) -> Knobs:
    """The knobs with the least squares of log(expected / measured): a step twice as long and one half as long as
    expected weigh the same, whatever their size."""
    measured = np.log([sample.seconds for sample in samples])

    def residuals(logs: Vector) -> Vector:
        knobs = Knobs(*np.exp(logs))
        return np.log([sample.step(knobs).seconds for sample in samples]) - measured

    start, least, most = (np.log(astuple(knobs)) for knobs in (_START, _LEAST, _MOST))
    return Knobs(*(float(value) for value in np.exp(least_squares(residuals, start, least, most))))


def fit_without_each(samples: Sequence[Sample]) -> dict[str, Knobs]:
    """For each case the knobs that fit all other cases, at all numbers of ranks."""
    cases = dict.fromkeys(sample.case for sample in samples)
    return {case: fit([sample for sample in samples if sample.case != case]) for case in cases}


def least_squares(residuals: Callable[[Vector], Vector], start: Vector, least: Vector, most: Vector) -> Vector:
    """Where the sum of squared residuals is smallest within bounds, as far as one goes downhill from `start`.

    Levenberg and Marquardt's method (Marquardt, SIAM J. Appl. Math. 1963); what stands at a bound and wants beyond it
    is left out of a step.
    """
    point, damping = np.clip(start, least, most), 1e-2
    off = residuals(point)
    for _ in range(_MOST_STEPS):
        slopes = _slopes(residuals, point, off, most)
        gradient = slopes.T @ off
        free = ~(((point <= least) & (gradient > 0)) | ((point >= most) & (gradient < 0)))
        if not free.any():
            break
        curvature = slopes[:, free].T @ slopes[:, free]
        gained = 0.0
        while damping < 1e10:
            damped = curvature + damping * np.diag(np.maximum(np.diag(curvature), 1e-12))
            tried = point.copy()
            tried[free] -= np.linalg.solve(damped, gradient[free])
            tried = np.clip(tried, least, most)
            tried_off = residuals(tried)
            gained = float(off @ off - tried_off @ tried_off)
            if gained > 0:
                point, off, damping = tried, tried_off, max(damping / 5, 1e-12)
                break
            damping *= 5
        if gained <= _SMALLEST_GAIN * float(off @ off) + 1e-18:
            break
    return point


def _slopes(residuals: Callable[[Vector], Vector], point: Vector, off: Vector, most: Vector) -> Vector:
    """Of each residual along each coordinate; from within where the point is at its upper bound."""
    columns = []
    for number in range(len(point)):
        nudge = -_NUDGE if point[number] + _NUDGE > most[number] else _NUDGE
        moved = point.copy()
        moved[number] += nudge
        columns.append((residuals(moved) - off) / nudge)
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Errors:
    """Of expected against measured step times, in percent of the measured one, signs left out."""

    mean_percent: float
    largest_percent: float

    def to_json(self) -> dict[str, float]:
        """For a result."""
        return asdict(self)


def error_percent(expected: float, measured: float) -> float:
    """Above 0: expected to take longer than it did."""
    return 100 * (expected / measured - 1)


def summarize(errors: Sequence[float]) -> Errors:
    """Of several cases."""
    sizes = [abs(error) for error in errors]
    return Errors(statistics.fmean(sizes), max(sizes))
