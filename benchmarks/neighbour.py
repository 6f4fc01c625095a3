"""What a busy neighbour on one core costs a training, by how long OpenMP's threads spin before they sleep.

    python -m benchmarks.neighbour --json benchmarks/results/neighbour.json

Threads that wait at the end of a parallel region spin first, on a core that another process may want, and sleep only
then. libgomp counts: GOMP_SPINCOUNT, 300,000 by its own default. One process with a thread a core trains, with each
count in turn, first alone and then beside a process that computes without end. plain is TorchRec's training with
libgomp's default. A slowdown is the median of (seconds of a step beside the neighbour / seconds alone) over rounds.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from benchmarks.flags import Parser, positive_int, result_file, run_script
from dlrm.bench.harness.flags import WARM_UP_STEPS, Shape
from dlrm.bench.harness.our_side import open_ours
from dlrm.bench.harness.plain_side import open_reference
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.shape import make_config
from dlrm.bench.harness.workers import Side, Workers, start_workers

SPIN = "GOMP_SPINCOUNT"
COUNTS = ("300000", "100000", "10000", "3000", "1000", "300", "0")
PLAIN = "plain"
NEIGHBOURS = {"alone": 0, "beside one": 1}
SECONDS_TO_SETTLE = 1.0
_TABLE_ROWS = 20_000  # all sides are in memory at once


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """So many processes that compute without end."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(number)]
    try:
        time.sleep(SECONDS_TO_SETTLE)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def start_sides(shape: Shape, steps: int, stack: ExitStack) -> dict[str, Workers]:
    """A training for each count, and plain TorchRec's. They wait until it is their turn."""
    config = make_config(shape, WARM_UP_STEPS + steps)
    sides = {}
    for count in COUNTS:
        os.environ[SPIN] = count
        sides[count] = stack.enter_context(start_workers(Side(count, open_ours, (config,), ("train",))))
    plain = Side(PLAIN, open_reference, (config,), ("train",), is_plain=True)
    sides[PLAIN] = stack.enter_context(start_workers(plain))
    for workers in sides.values():
        workers.open()
    return sides


def measure(sides: Mapping[str, Workers], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Median seconds of a step of each side, alone and beside a neighbour, by round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {case: [] for case in NEIGHBOURS} for name in sides}
    for number in range(rounds):
        order = [*sides][number % len(sides) :] + [*sides][: number % len(sides)]
        for case, neighbours in NEIGHBOURS.items():
            with busy_processes(neighbours):
                for name in order:
                    steps: Any = sides[name].take_turn("train")[0].value
                    seconds[name][case].append(statistics.median(steps))
        print(f"round {number + 1}/{rounds}", flush=True)
    return seconds


def summarize(seconds: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Of each side: what a neighbour costs, and its speed alone and beside one over that of libgomp's count."""
    base = seconds[COUNTS[0]]
    summary = {}
    for name, cases in seconds.items():
        alone, beside = cases.values()
        speeds = {
            f"speed {case}": statistics.median(b / own for b, own in zip(base[case], values, strict=True))
            for case, values in cases.items()
        }
        summary[name] = {"slowdown": statistics.median(b / a for a, b in zip(alone, beside, strict=True)), **speeds}
    return summary


def main() -> None:
    """Takes turns, and prints a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=positive_int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=40, help="timed steps of a turn (default: %(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=512, help="samples a step (default: %(default)s)")
    parser.add_argument("--json", type=result_file, help="where to write the result")
    arguments = parser.parse_args()
    shape = Shape(batch_size=arguments.batch_size, num_embeddings=_TABLE_ROWS)
    with ExitStack() as stack:
        seconds = measure(start_sides(shape, arguments.steps, stack), arguments.rounds)
    summary = summarize(seconds)
    print(f"{SPIN:<16}{'slowdown':>10}{'speed alone':>14}{'beside one':>13}   (speeds over those of {COUNTS[0]})")
    for name, row in summary.items():
        print(f"{name:<16}{row['slowdown']:>10.2f}{row['speed alone']:>14.2f}{row['speed beside one']:>13.2f}")
    result = {"batch_size": arguments.batch_size, "precision": shape.arithmetic, "steps": arguments.steps}
    write_result(arguments.json, {**result, "summary": summary, "seconds": seconds})


if __name__ == "__main__":
    run_script(main)
