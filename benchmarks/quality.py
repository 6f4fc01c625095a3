"""AUROC over several seeds: mean, spread, every single one.

    python -m benchmarks.quality --data DIR --json benchmarks/results/NAME.json -- --recipe kaggle_sample
    python -m benchmarks.quality --data DIR --against_plain -- --recipe kaggle_sample --precision int8

DIR holds binary days (`dlrm preprocess`). What stands after `--` goes to dlrm_main.py. `--against_plain` runs each seed
twice, as asked and on PyTorch's and FBGEMM's own operators in fp32, and gives the difference.
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.flags import Parser, each, result_file, run_script
from dlrm.bench.harness.provenance import read_summary, write_result
from dlrm.config.flags import is_named, parse_args
from dlrm.dataset.binary_days import open_splits
from dlrm.errors import ConfigError

ROOT = Path(__file__).parent.parent
PLAIN = ("--precision", "fp32")


def main() -> None:
    """Runs dlrm_main.py once a seed and prints a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of binary days")
    parser.add_argument(
        "--seeds", type=partial(each, int), default="0,1,2,3,4", help="comma-separated seeds (default: %(default)s)"
    )
    parser.add_argument(
        "--against_plain", action="store_true", help="each seed also with DLRM_KERNELS=none and --precision fp32"
    )
    parser.add_argument("--json", type=result_file, help="where to write the result")
    parser.add_argument("flags", nargs="*", help="flags of dlrm_main.py, after --")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        check_run(arguments.data, seed, arguments.flags)
        if arguments.against_plain:
            check_run(arguments.data, seed, [*arguments.flags, *PLAIN])
    runs, plain_runs = [], []
    for seed in arguments.seeds:
        runs.append(run_seed(arguments.data, seed, arguments.flags))
        if arguments.against_plain:
            plain_runs.append(run_seed(arguments.data, seed, arguments.flags, is_plain=True))
    result = {"flags": arguments.flags, **summarize(runs)}
    if arguments.against_plain:
        print("plain fp32:")
        result["plain"] = summarize(plain_runs)
        result["difference"] = {
            stage: mean - result["plain"]["auroc_mean"][stage] for stage, mean in result["auroc_mean"].items()
        }
        print("difference: " + ", ".join(f"{stage} {value:+.5f}" for stage, value in result["difference"].items()))
    write_result(arguments.json, result)


def summarize(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Prints mean and spread; gives the means and the runs."""
    means = {}
    for stage in ("val", "test", "mean"):
        values = [run[stage] for run in runs]
        means[stage] = statistics.mean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{stage:<5} mean {means[stage]:.5f}  standard deviation {spread:.5f}  min {min(values):.5f}")
    return {"auroc_mean": means, "runs": list(runs)}


def check_run(data: str, seed: int, flags: Sequence[str]) -> None:
    """Refuses what a run of this seed would refuse, and a run without both AUROCs.

    Raises:
        DlrmError: naming the flag or the file.
    """
    for name in ("in_memory_binary_criteo_path", "seed", "run_dir"):
        if is_named(flags, name):
            raise ConfigError(f"--{name} after --: this script sets it. Leave it out.")
    config = parse_args([*_flags(data, seed), *flags])
    if not (config.evaluation.validates and config.evaluation.evaluate_on_training_end):
        raise ConfigError(f"-- {shlex.join(flags)}: leaves val or test without an AUROC. Expected both to be scored.")
    open_splits(Path(data), config.data.dataset_name)


def _flags(data: str, seed: int) -> list[str]:
    return ["--in_memory_binary_criteo_path", data, "--seed", str(seed), "--no_print_progress"]


def run_seed(data: str, seed: int, flags: Sequence[str], *, is_plain: bool = False) -> dict[str, float]:
    """One run; its AUROC on val and test, and the mean of both."""
    environment = dict(os.environ)
    if is_plain:
        flags, environment["DLRM_KERNELS"] = [*flags, *PLAIN], "none"
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch, "run")
        subprocess.run(
            [sys.executable, str(ROOT / "dlrm_main.py"), *_flags(data, seed), "--run_dir", str(run_dir), *flags],
            check=True,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        summary = read_summary(run_dir)
    val, test = summary["val_auroc"][-1], summary["test_auroc"]
    print(f"{'plain ' if is_plain else ''}seed {seed}: val {val:.5f}, test {test:.5f}", flush=True)
    return {"seed": seed, "val": val, "test": test, "mean": (val + test) / 2}


if __name__ == "__main__":
    run_script(main)
