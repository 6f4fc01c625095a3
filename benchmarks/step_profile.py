"""Where a training step's time goes on a CPU, with PyTorch's and FBGEMM's operators and with ours.

    python -m benchmarks.step_profile --json benchmarks/results/step_profile.json

One process, the shape of the public example's results table, 100,000 rows a table, batch 4096. The two sides are
processes of their own, in turn: `before` has DLRM_KERNELS=none and the C library's own malloc settings, `after` is the
default. Time is what torch's profiler attributes to each operator itself; the last line is the rest of a step.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from typing import Any, get_args

from benchmarks.flags import Parser, positive_int, result_file, run_script
from dlrm.bench.harness.flags import WARM_UP_STEPS, Arithmetic
from dlrm.bench.harness.provenance import write_result

STEPS = 10
OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad")
SIDES = {
    "before": {"DLRM_KERNELS": "none", "THP_MEM_ALLOC_ENABLE": "0", "MALLOC_TOP_PAD_": "131072"},
    "after": {"THP_MEM_ALLOC_ENABLE": "1"},
}
"""131,072 is glibc's own value: a setting in the environment keeps the trainer's hands off the allocator. Torch reads
THP_MEM_ALLOC_ENABLE when it is loaded, which here is before the trainer sets it."""
GROUPS = {
    "matrix products": r"aten::(mm|addmm|bmm)$|dlrm::int(16|8)_",
    "table lookup": r"fbgemm::.*forward|dlrm::pool",
    "table update": r"fbgemm::.*backward|SplitLookupFunction|dlrm::update",
    "interaction and concatenation": r"aten::(cat|index_select|index|_index_put_impl_|stack)$|dlrm::interact",
    "bias, ReLU and their gradients": r"aten::(relu|clamp_min|threshold_backward|sum)$|dlrm::(add_bias_|mask_)",
    "dense optimizer": r"Optimizer\.step|aten::(_fused_sgd_|_fused_adagrad_|add_|_foreach.*)$",
    "copies, fills": r"aten::(copy_|fill_|zero_|mul|div)$",
}


def profile_steps(optimizer: str, precision: str) -> dict[str, float]:
    """Runs in a process of its own: milliseconds a step of each group."""
    from torch.profiler import ProfilerActivity, profile

    from dlrm.bench.harness.flags import Shape
    from dlrm.bench.harness.our_side import lay_timed_foundation, training_turns
    from dlrm.bench.harness.shape import make_config
    from dlrm.ranks.runtime import start_runtime
    from dlrm.system.allocator import tune_process
    from dlrm.system.quiet import quieten_libraries

    tune_process()
    quieten_libraries()
    options: Any = {"optimizer": optimizer, "precision": precision}
    config = make_config(Shape(ranks=1, **options), WARM_UP_STEPS + STEPS)
    with start_runtime() as runtime:
        turns = training_turns(*lay_timed_foundation(config, runtime))
        turns["train"]()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            seconds = turns["train"]()
        step_ms = 1e3 * statistics.mean(seconds)
    return {"step": step_ms, **group_times(profiler.key_averages(), WARM_UP_STEPS + STEPS, step_ms)}


def group_times(averages: Any, steps: int, step_ms: float) -> dict[str, float]:
    """Milliseconds a step of each group, and of what no group has."""
    times: dict[str, float] = defaultdict(float)
    for event in averages:
        for group, pattern in GROUPS.items():
            if re.match(pattern, event.key):
                times[group] += event.self_cpu_time_total / 1e3 / steps
    times["other operators, waiting and Python"] = max(0.0, step_ms - sum(times.values()))
    return times


def run_side(name: str, optimizer: str, precision: str) -> dict[str, float]:
    """One side's process, and what it measured."""
    command = [sys.executable, "-m", "benchmarks.step_profile", "--side", "--optimizer", optimizer]
    command += ["--precision", "fp32" if name == "before" else precision]
    done = subprocess.run(command, env={**os.environ, **SIDES[name]}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures and prints a table."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="sgd", help="of tables and dense parts (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=get_args(Arithmetic),
        default="fp32",
        help="of `after`; before is fp32 (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=result_file, help="where to write the result")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(profile_steps(arguments.optimizer, arguments.precision)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for number in range(arguments.rounds):
        for name, measured in rounds.items():
            measured.append(run_side(name, arguments.optimizer, arguments.precision))
            print(f"round {number + 1}/{arguments.rounds}  {name}", flush=True)
    medians = {
        name: {group: statistics.median(times.get(group, 0.0) for times in measured) for group in measured[0]}
        for name, measured in rounds.items()
    }
    whole = medians["before"]["step"]
    print(f"{'share of the step before':<40}before  after")
    for group in medians["before"]:
        print(f"{group:<40}{medians['before'][group] / whole:>6.1%} {medians['after'].get(group, 0.0) / whole:>6.1%}")
    shares = {name: {group: ms / whole for group, ms in times.items()} for name, times in medians.items()}
    options = {"optimizer": arguments.optimizer, "precision": arguments.precision}
    write_result(arguments.json, {**options, "share_of_step_before": shares, "milliseconds": rounds})


if __name__ == "__main__":
    run_script(main)
