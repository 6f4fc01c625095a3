"""AUROC over several seeds: mean, spread, every single one.

    python -m benchmarks.quality --data DIR --json benchmarks/results/NAME.json -- --recipe kaggle_sample

DIR holds binary days (`dlrm preprocess`). What stands after `--` goes to dlrm_main.py.
"""

import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.flags import Parser, each, result_file, run_script
from dlrm.bench.provenance import read_summary, write_result
from dlrm.data.binary_days import open_splits
from dlrm.errors import ConfigError
from dlrm.flags import is_named, parse_args

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Runs dlrm_main.py once a seed and prints a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of binary days")
    parser.add_argument(
        "--seeds", type=partial(each, int), default="0,1,2,3,4", help="comma-separated seeds (default: %(default)s)"
    )
    parser.add_argument("--json", type=result_file, help="where to write the result")
    parser.add_argument("flags", nargs="*", help="flags of dlrm_main.py, after --")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        check_run(arguments.data, seed, arguments.flags)
    runs = [run_seed(arguments.data, seed, arguments.flags) for seed in arguments.seeds]
    for stage in ("val", "test", "mean"):
        values = [run[stage] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{stage:<5} mean {statistics.mean(values):.5f}  standard deviation {spread:.5f}  min {min(values):.5f}")
    if arguments.json:
        means = {stage: statistics.mean(run[stage] for run in runs) for stage in ("val", "test", "mean")}
        write_result(arguments.json, {"flags": arguments.flags, "auroc_mean": means, "runs": runs})


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


def run_seed(data: str, seed: int, flags: Sequence[str]) -> dict[str, float]:
    """One run; its AUROC on val and test, and the mean of both."""
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch, "run")
        subprocess.run(
            [sys.executable, str(ROOT / "dlrm_main.py"), *_flags(data, seed), "--run_dir", str(run_dir), *flags],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        summary = read_summary(run_dir)
    val, test = summary["val_auroc"][-1], summary["test_auroc"]
    print(f"seed {seed}: val {val:.5f}, test {test:.5f}", flush=True)
    return {"seed": seed, "val": val, "test": test, "mean": (val + test) / 2}


if __name__ == "__main__":
    run_script(main)
