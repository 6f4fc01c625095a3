"""Trains for long with a checkpoint every 100 steps, and looks from outside for what grows.

    python -m benchmarks.soak --minutes 60 --hang_timeout 1 --json benchmarks/results/soak.json

With a --hang_timeout of one second the watchdog of each rank looks eight times a second.

Two ranks under torchrun on synthetic days, epoch after epoch, with validations. Every 10 s resident memory, open file
handles and threads of each rank are read. At the end SIGTERM must give a last checkpoint and exit code 143. The
first tenth of the time warms up; nothing may grow after it:

- File handles and threads come and go with checkpoints and epochs. What leaks raises both the fewest and the most that
  are seen: growth is the lesser of the two rises from the first to the last third.
- Memory is fitted by a line, least squares: growth is its rise, of which 1 % + 8 MiB may be noise.

The exit code is 1 if something has grown, or the run did not end as it should.
"""

import json
import re
import signal
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.flags import Parser, between, result_file, run_script
from benchmarks.kills import Run, folder_of_trainings, make_days
from dlrm.bench.harness.provenance import write_result
from dlrm.checkpoint.find import complete_checkpoints
from dlrm.checkpoint.store import open_store

ROWS = 60_000
FLAGS = [
    *("--num_embeddings", "20000", "--embedding_dim", "16", "--dense_arch_layer_sizes", "32,16"),
    *("--over_arch_layer_sizes", "32,1", "--batch_size", "32", "--optimizer", "rowwise_adagrad"),
    *("--learning_rate", "0.005", "--seed", "1", "--epochs", "1000000000", "--mmap_mode", "--shuffle_training_set"),
    *("--checkpoint_every", "100", "--validation_freq_within_epoch", "250", "--limit_val_batches", "20"),
    *("--no_print_progress",),
]
SECONDS_BETWEEN_SAMPLES = 10.0
LEAST_MINUTES = 0.5
"""So that there are three samples after the warm-up."""

WARM_UP = 0.1
EXIT_CODE = 128 + signal.SIGTERM
_MIB = 2**20
FREE_GROWTH = {"rss_mib": (0.01, 8.0), "num_handles": (0.0, 0.0), "num_threads": (0.0, 0.0)}
"""Of each measure, what is no growth: a share of what it is after the warm-up, and an amount."""


@dataclass(frozen=True)
class Sample:
    """A rank at a moment, in seconds since the run's first line of metrics."""

    seconds: float
    rank: int
    rss_mib: float
    num_handles: int
    num_threads: int


@dataclass(frozen=True)
class Trend:
    """A measure of a rank over the run. `growth` is in its unit, after the warm-up."""

    rank: int
    measure: str
    start: float
    warm: float
    end: float
    slope_per_hour: float
    growth: float
    has_grown: bool


def judge(samples: Sequence[Sample], warm_up: float = WARM_UP) -> list[Trend]:
    """A trend for each rank and measure; `warm_up` is a share of the time.

    Raises:
        ValueError: if a rank has fewer than three samples after the warm-up.
    """
    trends = []
    for rank in sorted({sample.rank for sample in samples}):
        own = sorted((sample for sample in samples if sample.rank == rank), key=lambda sample: sample.seconds)
        since = own[0].seconds + warm_up * (own[-1].seconds - own[0].seconds)
        warm = [sample for sample in own if sample.seconds >= since]
        if len(warm) < 3:
            raise ValueError(f"rank {rank}: {len(warm)} samples after the warm-up, expected 3 or more. Run for longer.")
        trends += [_judge_measure(measure, own, warm) for measure in FREE_GROWTH]
    return trends


def _judge_measure(measure: str, own: Sequence[Sample], warm: Sequence[Sample]) -> Trend:
    seconds, values = [sample.seconds for sample in warm], [float(getattr(sample, measure)) for sample in warm]
    slope = statistics.linear_regression(seconds, values).slope
    growth = slope * (seconds[-1] - seconds[0]) if measure == "rss_mib" else _rise(values)
    share, amount = FREE_GROWTH[measure]
    start = float(getattr(own[0], measure))
    has_grown = growth > share * values[0] + amount
    return Trend(own[0].rank, measure, start, values[0], values[-1], 3600 * slope, growth, has_grown)


def _rise(values: Sequence[float]) -> float:
    """From the first to the last third: of the smallest or of the largest, whichever rises less."""
    third = len(values) // 3
    first, last = values[:third], values[-third:]
    return min(min(last) - min(first), max(last) - max(first))


def take_samples(run: Run, minutes: float) -> Iterator[Sample]:
    """Of all ranks, until the time is over or one of them has ended."""
    ranks = {int(process.environ()["RANK"]): process for process in run.ranks()}
    started = time.monotonic()
    moments = (number * SECONDS_BETWEEN_SAMPLES for number in range(int(60 * minutes / SECONDS_BETWEEN_SAMPLES) + 1))
    for moment in moments:
        time.sleep(max(0.0, started + moment - time.monotonic()))
        for rank, process in ranks.items():
            try:
                rss, handles, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
            except psutil.Error:
                return
            yield Sample(time.monotonic() - started, rank, rss / _MIB, handles, threads)


def end(run: Run, log: Path) -> dict[str, Any]:
    """Ends the run by SIGTERM, and says how it ended. Its last checkpoint is read and checked."""
    for process in run.ranks():
        process.send_signal(signal.SIGTERM)
    run.wait()
    store = open_store(str(run.run_dir / "checkpoints"))
    newest = complete_checkpoints(store)[0]
    newest.verify(newest.manifest.files)
    return {**read_end(log.read_text()), "last_checkpoint": newest.manifest.step}


def read_end(log: str) -> dict[str, Any]:
    """The step that a run stopped after, by its own words, and ranks' exit codes, by torchrun's.

    torchrun sends SIGTERM to those that are left when one has ended: they may have -15, having saved.
    """
    stopped = re.search(r"SIGTERM: stopped after step ([0-9,]+), which is saved", log)
    codes = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", log)
    return {
        "stopped_after": int(stopped[1].replace(",", "")) if stopped else None,
        "exit_codes": {rank: int(code) for rank, code in codes},
    }


def has_ended_well(facts: dict[str, Any]) -> bool:
    """Whether the signal gave exit code 143, and a checkpoint of the very last step."""
    codes = set(facts["exit_codes"].values())
    return (
        EXIT_CODE in codes
        and codes <= {EXIT_CODE, -signal.SIGTERM}
        and (facts["last_checkpoint"] == facts["stopped_after"])
    )


def count_lines(run_dir: Path) -> dict[str, Any]:
    """What metrics.jsonl says of a run: checkpoints, how long they took, validations."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    saved = [line for line in lines if line["kind"] == "checkpoint"]
    return {
        "checkpoints": len(saved),
        "validations": sum(line["kind"] == "val" for line in lines),
        "median_stall_seconds": statistics.median(line["stall_seconds"] for line in saved),
        "median_write_seconds": statistics.median(line["write_seconds"] for line in saved),
    }


def print_trends(trends: Sequence[Trend]) -> None:
    """A line for each."""
    print(f"{'rank':<6}{'':<13}{'start':>9}{'warm':>9}{'end':>9}{'slope/h':>10}{'growth':>9}")
    for trend in trends:
        values = f"{trend.start:>9.1f}{trend.warm:>9.1f}{trend.end:>9.1f}{trend.slope_per_hour:>+10.2f}"
        verdict = "  GROWS" if trend.has_grown else ""
        print(f"{trend.rank:<6}{trend.measure:<13}{values}{trend.growth:>+9.2f}{verdict}")


def main() -> int:
    """Runs, samples, judges."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--minutes", type=between(LEAST_MINUTES, 1e6), default=30.0, help="how long (default: %(default)s)"
    )
    parser.add_argument(
        "--hang_timeout",
        type=between(1.0, 1e9),
        default=600.0,
        help="the training's, in seconds (default: %(default)s)",
    )
    parser.add_argument("--json", type=result_file, help="where to write the result")
    arguments = parser.parse_args()
    flags = [*FLAGS, "--hang_timeout", f"{arguments.hang_timeout:g}"]
    with folder_of_trainings() as folder:
        run = Run(make_days(folder, ROWS), folder / "run", 0, flags)
        while not run.has_begun() and run.process.poll() is None:
            time.sleep(0.1)
        samples = list(take_samples(run, arguments.minutes))
        log = folder / "run.log"
        if run.process.poll() is not None:
            print(log.read_text()[-3000:])
            return 1
        facts = {**end(run, log), **count_lines(run.run_dir)}
        is_well = has_ended_well(facts)
        if not is_well:
            print(log.read_text()[-3000:])
    trends = judge(samples)
    print_trends(trends)
    print(
        f"{facts['stopped_after']} steps, {facts['checkpoints']} checkpoints, {facts['validations']} validations in "
        f"{arguments.minutes:g} minutes; SIGTERM gave exit codes {facts['exit_codes']}, last checkpoint at step "
        f"{facts['last_checkpoint']}"
    )
    result = {"minutes": arguments.minutes, "flags": flags, **facts, "ended_well": is_well}
    sampled = {"trends": [asdict(trend) for trend in trends], "samples": [asdict(sample) for sample in samples]}
    write_result(arguments.json, {**result, **sampled})
    return 0 if is_well and not any(trend.has_grown for trend in trends) else 1


if __name__ == "__main__":
    run_script(main)
