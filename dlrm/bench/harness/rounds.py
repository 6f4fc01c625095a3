"""Rounds: each side takes its turns, one side after the other."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from dlrm.bench.harness.ceilings import CEILINGS
from dlrm.bench.harness.floor import Ceilings
from dlrm.bench.harness.workers import Reply, Side, Workers, start_workers
from dlrm.system.host import available_memory_bytes

_GIB_BESIDE_TABLES = 1.5
"""Of a rank: libraries, dense layers, small batches, and some room."""

_BYTES_PER_SAMPLE = 100_000
"""Of a step: activations and their gradients, some in several copies."""


@dataclass
class SideResult:
    """What a side's turns gave.

    Attributes:
        turns: of each turn by name, over rounds, what rank 0 gave.
        facts: of each rank, what its turn `describe` gave, where the side has one.
        peak_rss_gib: of each rank.
    """

    side: Side
    turns: dict[str, list[Any]] = field(default_factory=dict)
    facts: list[Mapping[str, Any]] = field(default_factory=list)
    peak_rss_gib: list[float] = field(default_factory=list)

    def add(self, name: str, replies: Sequence[Reply]) -> None:
        """Takes in one turn of all ranks."""
        self.turns.setdefault(name, []).append(replies[0].value)
        peaks = [reply.peak_rss_gib for reply in replies]
        self.peak_rss_gib = [max(pair) for pair in zip(peaks, self.peak_rss_gib or peaks, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """For a result: memory, threads, kernels, by rank."""
        facts = {name: [rank[name] for rank in self.facts] for name in (self.facts[0] if self.facts else ())}
        return {"ranks": self.side.ranks, "peak_rss_gib": self.peak_rss_gib, **facts}


def fits_at_once(sides: Sequence[Side], tables_gib: float, samples: int) -> bool:
    """Whether all sides fit into memory beside each other.

    Args:
        sides: all that hold tables.
        tables_gib: of a side, with optimizer state, over its ranks.
        samples: of a step, over its ranks.
    """
    activations_gib = samples * _BYTES_PER_SAMPLE / 2**30
    needed = sum(tables_gib + activations_gib + side.ranks * _GIB_BESIDE_TABLES for side in sides)
    free = available_memory_bytes(sum(side.ranks for side in sides)) / 2**30
    if needed > free:
        print(
            f"Both sides at once need about {needed:.1f} GiB, {free:.1f} are free: each turn starts processes anew.",
            flush=True,
        )
    return needed <= free


def take_turns(
    sides: Sequence[Side],
    rounds: int,
    show: Callable[[str, str, Any], str | None],
    *,
    at_once: bool = True,
) -> dict[str, SideResult]:
    """Runs all turns of all sides, round by round.

    Args:
        sides: in the order of their turns.
        rounds: how many.
        show: gives a line for a turn that is over, from side, turn and what it gave.
        at_once: keep all sides' processes from the first round to the last; else each turn starts its own.

    Raises:
        DlrmError: what a side raised.
    """
    results = {side.name: SideResult(side) for side in sides}
    count = sum(side.ranks for side in sides)
    print(f"Starting {count} process{'es' * (count > 1)}: {', '.join(results)}.", flush=True)
    with ExitStack() as stack:
        started = time.monotonic()
        alive = [stack.enter_context(start_workers(side)) for side in sides] if at_once else []
        for workers in alive:
            workers.open()
        if alive:
            print(f"Ready after {time.monotonic() - started:.0f} s.", flush=True)
        for number in range(rounds):
            for index, side in enumerate(sides):
                with ExitStack() as turn:
                    workers = alive[index] if at_once else turn.enter_context(start_workers(side))
                    _take_side(workers, results[side.name], f"round {number + 1}/{rounds}", show)
    return results


def _take_side(workers: Workers, result: SideResult, label: str, show: Callable[[str, str, Any], str | None]) -> None:
    for name in workers.side.turns:
        replies = workers.take_turn(name)
        if name == "describe":
            result.facts = [reply.value for reply in replies]
            continue
        result.add(name, replies)
        if (line := show(workers.side.name, name, replies[0].value)) is not None:
            print(f"{label}  {line}", flush=True)


def best_ceilings(results: Mapping[str, SideResult]) -> Ceilings:
    """The best of all rounds."""
    measured: list[Ceilings] = results[CEILINGS].turns["measure"]
    return Ceilings(max(c.flop_per_second for c in measured), max(c.bytes_per_second for c in measured))
