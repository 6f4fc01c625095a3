"""How long it takes to start: both commands' --help, and a run up to the end of its first training step.

    python -m benchmarks.startup --json benchmarks/results/startup.json

All of it takes turns with `python -c "import torch"`, whose time the ratios are in. The run has the shape of the public
example's results table with 100,000 rows a table, in one process and on two ranks; from its time that of its imports
alone, started in the same way, is taken off.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.flags import Parser, positive_int, result_file, run_script
from dlrm.bench.harness.provenance import write_result

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", "2", "--rdzv_backend", "c10d")
RENDEZVOUS = ("--rdzv_endpoint", "localhost:0")
IMPORTS = "import dlrm.train.run, time; print(time.time())"
FIRST_STEP = (
    *("--embedding_dim", "128", "--dense_arch_layer_sizes", "512,256,128"),
    *("--over_arch_layer_sizes", "1024,1024,512,256,1", "--learning_rate", "0.1", "--seed", "0", "--log_every", "1"),
    *("--limit_train_batches", "1", "--no_evaluate_on_epoch_end", "--no_evaluate_on_training_end"),
)


def python(*arguments: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done.stdout


def whole(*arguments: str) -> float:
    """Seconds from start to end of an interpreter."""
    started = time.perf_counter()
    python(*arguments)
    return time.perf_counter() - started


def imports(ranks: int) -> float:
    """Seconds from start until the slowest rank has imported what a run needs."""
    launcher = (*TORCHRUN, *RENDEZVOUS, "--no_python", sys.executable) if ranks > 1 else ()
    started = time.time()
    ends = python(*launcher, "-c", IMPORTS).split()
    return max(map(float, ends)) - started


def first_step(ranks: int, global_batch_size: int) -> float:
    """Seconds from start to the end of the first training step, when metrics.jsonl is written for the last time."""
    launcher = (*TORCHRUN, *RENDEZVOUS) if ranks > 1 else ()
    with tempfile.TemporaryDirectory() as folder:
        batch = ("--batch_size", str(global_batch_size // ranks))
        started = time.time()
        python(*launcher, "dlrm_main.py", *FIRST_STEP, *batch, "--run_dir", folder)
        return Path(folder, "metrics.jsonl").stat().st_mtime - started


def main() -> None:
    """Takes turns, and prints a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=positive_int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=positive_int, default=4096, help="samples over all ranks (default: %(default)s)"
    )
    parser.add_argument("--json", type=result_file, help="where to write the result")
    arguments = parser.parse_args()
    if arguments.batch_size % 2:
        parser.error(f"--batch_size: got {arguments.batch_size}, expected an even number: two ranks share it")
    sides: dict[str, Callable[[], float]] = {
        "import torch": lambda: whole("-c", "import torch"),
        "dlrm_main.py --help": lambda: whole("dlrm_main.py", "--help"),
        "dlrm --help": lambda: whole("-c", "import sys; from dlrm.cli import main; sys.exit(main(['--help']))"),
        "imports, 1 process": lambda: imports(1),
        "first step, 1 process": lambda: first_step(1, arguments.batch_size),
        "imports, 2 ranks": lambda: imports(2),
        "first step, 2 ranks": lambda: first_step(2, arguments.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, measure in sides.items():
            seconds[name].append(measure())
    for ranks in ("1 process", "2 ranks"):
        pairs = zip(seconds[f"first step, {ranks}"], seconds[f"imports, {ranks}"], strict=True)
        seconds[f"on top of imports, {ranks}"] = [step - imported for step, imported in pairs]
    print(f"{'':<30}{'seconds: median':>16}{'min':>8}{'max':>8}{'of import torch':>18}")
    ratios = {}
    for name, values in seconds.items():
        by_round = [value / base for value, base in zip(values, seconds["import torch"], strict=True)]
        ratios[name] = statistics.median(by_round)
        print(
            f"{name:<30}{statistics.median(values):>16.2f}{min(values):>8.2f}{max(values):>8.2f}{ratios[name]:>18.2f}"
        )
    if arguments.json:
        write_result(arguments.json, {"ratios_to_import_torch": ratios, "seconds": seconds})


if __name__ == "__main__":
    run_script(main)
