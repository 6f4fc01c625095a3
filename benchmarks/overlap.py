"""What share of batch building and of the all-to-alls is hidden behind compute.

    python -m benchmarks.overlap --json benchmarks/results/overlap.json

Two sides in turn, in the same processes: `on` is the trainer's default (--pipeline sparse_dist, batches built ahead on
a thread), `off` is --pipeline base with each batch built when it is asked for. The shape is that of the public
example's results table with fewer rows a table.

Shares are measured in the trace that --profile writes. A phase's time is the union of its intervals: of an all-to-all
from the launch of each of its collectives to completion on another thread; of batch building, while a batch is built.
It is hidden while the training thread is inside forward, backward or optimizer, and there neither launches, awaits nor
unpacks this very all-to-all. The rest of it is exposed. Both are summed over ranks.

The pipeline is to hide batch building and the input all-to-all (ids to the ranks that hold their tables). The output
all-to-all (pooled rows back, and backward their gradients) is not its task: the order of the model's parts hides some.
"""

import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import Parser, between, positive_int, result_file, run_script
from dlrm.assembly.foundation import lay_foundation
from dlrm.assembly.pipeline import PipelineName
from dlrm.bench.harness.flags import Shape
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.shape import make_config
from dlrm.bench.harness.workers import Side as Processes
from dlrm.bench.harness.workers import Turns, start_workers
from dlrm.config.config import PROFILE_WARM_UP_STEPS, Config
from dlrm.ranks.runtime import Runtime, start_runtime
from dlrm.train.profiling import StepProfiler

WARM_UP_STEPS = 6
"""More than the batches ahead, so that those which waited through the other side's turn are used up."""

_COLLECTIVES = ("shared_memory:all_to_all", "shared_memory:meet", "gloo:all_to_all")
Interval = tuple[float, float]
PHASES = ("batch_building", "input_all_to_all", "output_all_to_all")


@dataclass(frozen=True)
class Side:
    """One of the two settings."""

    pipeline: PipelineName
    batches_ahead: int


SIDES = {"on": Side("sparse_dist", 4), "off": Side("base", 0)}

_COMPUTE = re.compile(r"## (forward|backward|optimizer)( \d+)? ##")
_LAUNCH = {
    "input_all_to_all": re.compile(r"## all2all_data:kjt "),
    "output_all_to_all": re.compile(r"## All2All_Pooled_(fwd|bwd) ##"),
}
_OCCUPIED = {
    "input_all_to_all": re.compile(
        r"## (start|wait)_sparse_data_dist|## runtime_forward_assemble_KJT|## all2all_data:|\[splits_dist\]"
        r"|## (\w*Splits\w*|KJT\w*)Awaitable wait\(\)"
    ),
    "output_all_to_all": re.compile(
        r"(## )?All2All_Pooled_|## (EmbeddingBagCollection|PooledEmbeddings)Awaitable wait\(\)|## Request wait\(\)"
    ),
}
"""Spans in which the training thread starts, awaits or unpacks the all-to-all."""


@dataclass(frozen=True)
class PhaseTime:
    """Microseconds of a phase in a trace, and how many of them were hidden."""

    total: float
    hidden: float


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points of time as disjoint intervals, in order."""
    merged: list[Interval] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif stop > start:
            merged.append((start, stop))
    return merged


def intersection(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Points of time in both; each is disjoint."""
    common = [(max(a, c), min(b, d)) for a, b in first for c, d in second]
    return union((start, stop) for start, stop in common if start < stop)


def length(intervals: list[Interval]) -> float:
    """Of disjoint intervals."""
    return sum(stop - start for start, stop in intervals)


def measure_trace(events: list[dict[str, Any]]) -> tuple[float, dict[str, PhaseTime]]:
    """Microseconds of a trace's steps, and of the phases in them."""
    spans = [
        (event["name"], event["tid"], (event["ts"], event["ts"] + event["dur"]))
        for event in events
        if event.get("ph") == "X"
    ]
    steps = union(interval for name, _, interval in spans if name.startswith("ProfilerStep#"))
    training_thread = next(thread for name, thread, _ in spans if name.startswith("ProfilerStep#"))
    own = [(name, interval) for name, thread, interval in spans if thread == training_thread]
    collectives = sorted(interval for name, _, interval in spans if name in _COLLECTIVES)

    inside = union(interval for name, interval in own if _COMPUTE.match(name))
    built = union(interval for name, _, interval in spans if name == "## build_batch ##")
    measured = {"batch_building": _measure_phase(built, inside, [], steps)}
    for phase, launch in _LAUNCH.items():
        launches = [interval for name, interval in own if launch.match(name)]
        flights = union(flight for start, stop in launches for flight in _find_flights(start, stop, collectives))
        occupied = union(interval for name, interval in own if _OCCUPIED[phase].match(name))
        measured[phase] = _measure_phase(flights, inside, occupied, steps)
    return length(steps), measured


def _find_flights(start: float, stop: float, collectives: list[Interval]) -> list[Interval]:
    """Those that begin within a launch; or, where their thread was late, the first after it."""
    since = [interval for interval in collectives if interval[0] >= start]
    return [interval for interval in since if interval[0] <= stop] or since[:1]


def _measure_phase(
    phase: list[Interval], inside: list[Interval], occupied: list[Interval], steps: list[Interval]
) -> PhaseTime:
    within = intersection(phase, steps)
    covered = intersection(within, inside)
    return PhaseTime(length(within), length(covered) - length(intersection(covered, occupied)))


def build_side(side: Side, config: Config, runtime: Runtime, steps: int) -> Callable[[Path], dict[str, Any]]:
    """A function that trains one turn, writing traces to a folder, and gives samples/s and this rank's phases."""
    config = replace(config, training=replace(config.training, pipeline=side.pipeline))
    foundation = lay_foundation(config, runtime, ("train",), is_quiet=True)
    pipeline = foundation.pipeline
    batches = replace(foundation.splits["train"], batches_ahead=side.batches_ahead).batches()
    foundation.model.train()

    def take_turn(folder: Path) -> dict[str, Any]:
        for _ in range(WARM_UP_STEPS):
            pipeline.progress(batches)
        started = time.perf_counter()
        for _ in range(steps):
            pipeline.progress(batches)
        rate = steps * config.data.batch_size * runtime.world_size / (time.perf_counter() - started)
        profiler = StepProfiler(steps, folder, runtime)
        for _ in range(PROFILE_WARM_UP_STEPS + steps):
            pipeline.progress(batches)
            profiler.advance()
        profiler.close()
        microseconds, phases = measure_trace(json.loads(gzip.decompress(profiler.path.read_bytes()))["traceEvents"])
        return {"samples_per_second": rate, "traced_us": microseconds, "phases": phases}

    return take_turn


def steps_per_turn(steps: int) -> int:
    """Of which `steps` are timed, and as many traced."""
    return WARM_UP_STEPS + steps + PROFILE_WARM_UP_STEPS + steps


@contextmanager
def open_sides(config: Config, steps: int) -> Iterator[Turns]:
    """In each rank: both sides' turns, and `describe`."""
    with start_runtime() as runtime, tempfile.TemporaryDirectory() as folder:
        built = {name: build_side(side, config, runtime, steps) for name, side in SIDES.items()}
        turns = {name: partial(take_turn, Path(folder)) for name, take_turn in built.items()}
        yield {**turns, "describe": torch.get_num_threads}


def combine(turns: list[list[dict[str, Any]]]) -> dict[str, list[float]]:
    """By round, over ranks: samples/s, the share of each phase that is hidden, and the rest as a share of the steps."""
    combined: dict[str, list[float]] = {"samples_per_second": []}
    for ranks in turns:
        combined["samples_per_second"].append(ranks[0]["samples_per_second"])
        for name in PHASES:
            times = [turn["phases"][name] for turn in ranks]
            total, hidden = sum(time.total for time in times), sum(time.hidden for time in times)
            exposed = (total - hidden) / sum(turn["traced_us"] for turn in ranks)
            combined.setdefault(f"{name}_hidden", []).append(hidden / total)
            combined.setdefault(f"{name}_exposed_of_step", []).append(exposed)
    return combined


def print_table(rounds: dict[str, dict[str, list[float]]]) -> None:
    """Median and range over rounds of each quantity, both sides beside each other."""
    print(f"{'':<34}{'on: median':>12} {'min':>8} {'max':>8}{'off: median':>14} {'min':>8} {'max':>8}")
    for quantity in rounds["on"]:
        shown = "{:,.0f}" if quantity == "samples_per_second" else "{:.1%}"
        cells = [
            [shown.format(pick(rounds[name][quantity])) for pick in (statistics.median, min, max)] for name in SIDES
        ]
        on, off = cells
        print(f"{quantity:<34}{on[0]:>12} {on[1]:>8} {on[2]:>8}{off[0]:>14} {off[1]:>8} {off[2]:>8}")


def main() -> None:
    """Runs the comparison and prints a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--ranks", type=between(2, 1024), default=2, help="processes (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=512, help="samples per rank (default: %(default)s)")
    parser.add_argument(
        "--num_embeddings", type=positive_int, default=100_000, help="rows a table (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=10, help="timed, then traced steps (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=result_file, help="where to write the result")
    arguments = parser.parse_args()
    ranks, steps = arguments.ranks, arguments.steps
    shape = Shape(arguments.batch_size * ranks, precision="fp32", num_embeddings=arguments.num_embeddings, ranks=ranks)
    shape.validate()
    more_than_enough = arguments.rounds * steps_per_turn(steps) + 100
    config = make_config(shape, more_than_enough)
    config = replace(config, data=replace(config.data, num_generated_batches=None))  # each batch is built
    turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in SIDES}
    with start_workers(Processes("overlap", open_sides, (config, steps), (*SIDES,), ranks)) as workers:
        threads = workers.take_turn("describe")[0].value
        for number in range(arguments.rounds):
            for name, taken in turns.items():
                taken.append([reply.value for reply in workers.take_turn(name)])
                rate = taken[-1][0]["samples_per_second"]
                print(f"round {number + 1}/{arguments.rounds}  {name:<3}  {rate:>9,.0f} samples/s", flush=True)
    rounds = {name: combine(taken) for name, taken in turns.items()}
    ratios = [on / off for on, off in zip(*(rounds[name]["samples_per_second"] for name in ("on", "off")), strict=True)]
    print_table(rounds)
    print(
        f"samples/s, on over off, by round: median {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f}"
    )
    if arguments.json:
        write_result(
            arguments.json,
            {
                "ranks": ranks,
                "sides": {name: asdict(side) for name, side in SIDES.items()},
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "rounds": rounds,
                "threads_per_rank": threads,
                "config": asdict(config),
            },
        )


if __name__ == "__main__":
    from benchmarks import overlap  # by this name, and not as __main__, other processes find what they are to call

    run_script(overlap.main)
