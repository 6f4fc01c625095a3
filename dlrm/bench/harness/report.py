"""Figures of a comparison: median and spread, ratio, share of the floor; as a table and as JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dlrm.bench.harness.floor import Floor
from dlrm.system.console import plural


@dataclass(frozen=True)
class Speed:
    """Steps of a side's turns.

    Attributes:
        samples: of each step, over all ranks.
        step_seconds: by round, of each step.
    """

    samples: float
    step_seconds: Sequence[Sequence[float]]

    @property
    def rates(self) -> list[float]:
        """Samples per second of each round."""
        return [self.samples * len(steps) / sum(steps) for steps in self.step_seconds]

    @property
    def rate(self) -> float:
        """The median over rounds."""
        return statistics.median(self.rates)

    @property
    def seconds(self) -> float:
        """Of a step at that rate."""
        return self.samples / self.rate

    def to_json(self) -> dict[str, Any]:
        """For a result."""
        steps = sorted(seconds for times in self.step_seconds for seconds in times)
        return {
            "samples_per_second": {"median": self.rate, "min": min(self.rates), "max": max(self.rates)},
            "rounds": self.rates,
            "step_ms": {f"p{share}": 1000 * quantile(steps, share / 100) for share in (10, 50, 90)},
            "samples_per_step": self.samples,
            "step_seconds": [list(times) for times in self.step_seconds],
        }


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie, between two of them in proportion."""
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def ratios(first: Speed, second: Speed) -> list[float]:
    """How many times the second's rate the first has, round by round."""
    return [a / b for a, b in zip(first.rates, second.rates, strict=True)]


def compare(first: Speed, second: Speed, floor: Floor) -> dict[str, Any]:
    """What every result has at its top level, of our side and a reference."""
    by_round = ratios(first, second)
    return {
        "ratio": statistics.median(by_round),
        "ratios": by_round,
        "share_of_floor": floor.seconds / first.seconds,
        "share_of_floor_sum": floor.sum_seconds / first.seconds,
        "floor": floor.to_json(),
    }


def print_speeds(speeds: dict[str, Speed], unit: str = "samples") -> None:
    """A line for each."""
    width = max(map(len, speeds))
    head = f"{unit + '/s: median':>20} {'min':>11} {'max':>11}   {'step, ms: P10':>13} {'P50':>8} {'P90':>8}"
    print(f"\n{'':<{width}}  {head}")
    for name, speed in speeds.items():
        steps = sorted(1000 * seconds for times in speed.step_seconds for seconds in times)
        p10, p50, p90 = (quantile(steps, share) for share in (0.1, 0.5, 0.9))
        rates = f"{speed.rate:>20,.0f} {min(speed.rates):>11,.0f} {max(speed.rates):>11,.0f}"
        print(f"{name:<{width}}  {rates}   {p10:>13,.1f} {p50:>8,.1f} {p90:>8,.1f}")


def print_durations(seconds: Mapping[str, Sequence[float]], gib: float) -> None:
    """A line for each: seconds over the rounds, and seconds a GiB."""
    width = max(map(len, seconds))
    print(f"\n{'':<{width}}{'seconds: median':>17}{'min':>9}{'max':>9}{'s/GiB':>9}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<{width}}{median:>17.3f}{min(values):>9.3f}{max(values):>9.3f}{median / gib:>9.3f}")


def describe_spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def print_memory(name: str, facts: dict[str, Any]) -> None:
    """Peak of resident memory, and what of it is tables and their optimizer's state, of the rank that took most."""
    peaks = facts["peak_rss_gib"]
    rank = max(range(len(peaks)), key=peaks.__getitem__)
    tables, state = facts["tables_gib"][rank], facts["state_gib"][rank]
    print(
        f"{name}: peak RSS {peaks[rank]:.2f} GiB a rank = tables {tables:.2f} + optimizer state {state:.2f} + "
        f"{peaks[rank] - tables - state:.2f}"
    )


def print_means(name: str, facts: dict[str, Any]) -> None:
    """What a side's first rank computes with."""
    print(f"{name}: {plural(facts['threads'][0], 'thread')} a rank, {facts['kernels'][0]}; {facts['allocator'][0]}")


def print_floor(floor: Floor, speed: Speed, what: str) -> None:
    """The floor of a step, and how close our side is to it."""
    work, ceilings = floor.work, floor.ceilings
    products = (
        f"{1000 * floor.matrix_seconds:,.2f} ms of matrix products ({work.flop / 1e9:,.2f} GFLOP at "
        f"{ceilings.flop_per_second / 1e12:.3f} TFLOP/s), "
        if work.flop
        else ""
    )
    print(
        f"Floor of {what}: {products}{1000 * floor.memory_seconds:,.2f} ms of memory traffic "
        f"({work.num_bytes / 1e9:,.3f} GB at {ceilings.bytes_per_second / 1e9:.1f} GB/s). "
        f"Ours takes {1000 * speed.seconds:,.2f} ms: {floor.seconds / speed.seconds:.1%} of the floor's speed, "
        f"{floor.sum_seconds / speed.seconds:.1%} if the two do not overlap."
    )
