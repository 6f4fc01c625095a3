"""Plans of the public example's three configurations on the clusters that it ran on, and of MLPerf's first benchmark.

    python -m benchmarks.plans --json benchmarks/results/plans.json

Each is a call of `dlrm plan`, timed from its start to its end. The example's are planned again with other numbers
for what its results table does not say.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flags import Parser, result_file, run_script
from dlrm.bench.harness.provenance import write_result

ROOT = Path(__file__).parent.parent
CLUSTERS = {
    "spec_mlperf_a100x8": "a100_40gb:1x8",
    "spec_mlperf_x2_a100x16": "a100_40gb:2x8",
    "spec_full_size_a100x80": "a100_40gb:10x8",
    "mlperf_v1": "a100_40gb:1x8",
}
"""By recipe."""

OTHERWISE = {
    "spec_mlperf_a100x8": ("--allow_tf32",),
    "spec_mlperf_x2_a100x16": ("--inter_host_bandwidth", "12.5"),
    "spec_full_size_a100x80": ("--inter_host_bandwidth", "12.5"),
}
"""Flags beside a recipe. 12.5 GiB/s between hosts is what TorchRec's planner assumes, a quarter of their data sheet."""


def main() -> None:
    """Plans, prints a line each, and writes the result."""
    parser = Parser(description=__doc__)
    parser.add_argument("--json", type=result_file, help="where to write the result")
    arguments = parser.parse_args()
    plans = []
    runs = [(recipe, ()) for recipe in CLUSTERS] + list(OTHERWISE.items())
    for recipe, flags in runs:
        plans.append(plan(recipe, flags))
        facts = plans[-1]["facts"]
        print(
            f"{plans[-1]['command']}: {facts['tables_gib']:.2f} GiB, {facts['step']['samples_per_second']:,.0f} "
            f"samples/s expected; planned in {plans[-1]['seconds']:.1f} s",
            flush=True,
        )
    write_result(arguments.json, {"plans": plans})


def plan(recipe: str, flags: Sequence[str]) -> dict[str, Any]:
    """One call of `dlrm plan`."""
    arguments = ["plan", "--recipe", recipe, "--cluster", CLUSTERS[recipe], *flags, "--json"]
    started = time.perf_counter()
    call = [sys.executable, "-c", "import sys; from dlrm.cli import main; sys.exit(main(sys.argv[1:]))", *arguments]
    done = subprocess.run(call, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return {
        "recipe": recipe,
        "flags": list(flags),
        "command": shlex.join(["dlrm", *arguments]),
        "seconds": time.perf_counter() - started,
        "facts": json.loads(done.stdout),
    }


if __name__ == "__main__":
    run_script(main)
