"""AUROC over several seeds: mean, spread, every single one.

    python -m benchmarks.quality --data DIR --json benchmarks/results/NAME.json -- --recipe kaggle_sample

DIR holds binary days (`dlrm preprocess`). What stands after `--` goes to dlrm_main.py.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dlrm.bench.provenance import read_summary, write_result

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Runs dlrm_main.py once a seed and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of binary days")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated seeds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("flags", nargs="*", help="flags of dlrm_main.py, after --")
    arguments = parser.parse_args()
    runs = [run_seed(arguments.data, int(seed), arguments.flags) for seed in arguments.seeds.split(",")]
    for stage in ("val", "test", "mean"):
        values = [run[stage] for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{stage:<5} mean {statistics.mean(values):.5f}  standard deviation {spread:.5f}  min {min(values):.5f}")
    if arguments.json:
        means = {stage: statistics.mean(run[stage] for run in runs) for stage in ("val", "test", "mean")}
        write_result(arguments.json, {"flags": arguments.flags, "auroc_mean": means, "runs": runs})


def run_seed(data: str, seed: int, flags: list[str]) -> dict[str, float]:
    """One run; its AUROC on val and test, and the mean of both."""
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch, "run")
        command = [sys.executable, str(ROOT / "dlrm_main.py"), "--in_memory_binary_criteo_path", data]
        subprocess.run(
            [*command, "--seed", str(seed), "--run_dir", str(run_dir), "--no_print_progress", *flags],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        summary = read_summary(run_dir)
    val, test = summary["val_auroc"][-1], summary["test_auroc"]
    print(f"seed {seed}: val {val:.5f}, test {test:.5f}", flush=True)
    return {"seed": seed, "val": val, "test": test, "mean": (val + test) / 2}


if __name__ == "__main__":
    main()
