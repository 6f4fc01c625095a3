"""Kills a training at random moments, starts it again, and compares what comes out with an undisturbed run's.

    python -m benchmarks.kills --moments 50 --json benchmarks/results/kills.json

A run is two ranks under torchrun on synthetic days, with a checkpoint every few steps, so that many kills fall into the
writing of one. Three kinds: `rank` kills one of the ranks, and torchrun (--max-restarts 1) starts both again; `ranks`
kills all ranks, and `launcher` torchrun alone, and the same command is started again. SIGKILL throughout. At the end of
each, the last checkpoint's tensors (weights, optimizer states, random states) and all losses and validations must be
those of the undisturbed run, bit for bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.flags import Parser, between, positive_int, result_file, run_script, some_of
from dlrm.bench.harness.provenance import write_result
from dlrm.checkpoint.find import complete_checkpoints
from dlrm.checkpoint.store import open_store
from dlrm.preprocess.command import main as preprocess
from dlrm.synthesize.command import main as synthesize

KINDS = ("rank", "ranks", "launcher")
STEPS = 60
FLAGS = [
    *("--num_embeddings", "2000", "--embedding_dim", "16", "--dense_arch_layer_sizes", "32,16"),
    *("--over_arch_layer_sizes", "32,1", "--batch_size", "32", "--optimizer", "rowwise_adagrad"),
    *("--learning_rate", "0.05", "--seed", "1", "--epochs", "2", "--limit_train_batches", str(STEPS)),
    *("--limit_val_batches", "5", "--limit_test_batches", "5", "--validation_freq_within_epoch", "25"),
    *("--mmap_mode", "--shuffle_training_set", "--checkpoint_every", "4", "--log_every", "3"),
]
SECONDS_FOR_A_RUN = 300


def make_days(folder: Path, rows: int = 12_000) -> Path:
    """Small binary days."""
    synthesize([str(folder / "raw"), "--rows", str(rows), "--days", "2"])
    preprocess([*map(str, sorted((folder / "raw").glob("day_*.tsv"))), "--output", str(folder / "days")])
    return folder / "days"


@contextmanager
def folder_of_trainings() -> Iterator[Path]:
    """A temporary folder. Trainings in it that are left end before it goes."""
    with tempfile.TemporaryDirectory() as name:
        try:
            yield Path(name)
        finally:
            # torchrun may start ranks anew as long as it lives, and without it they are nobody's children.
            while left := [process for process in psutil.process_iter() if _is_in(Path(name), process)]:
                for process in left:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                psutil.wait_procs(left, timeout=10)


def _is_in(folder: Path, process: psutil.Process) -> bool:
    return any(flag == "--run_dir" and Path(value).parent == folder for flag, value in pairwise(_command(process)))


class Run:
    """A training under torchrun."""

    def __init__(self, days: Path, run_dir: Path, max_restarts: int, flags: Sequence[str] = FLAGS) -> None:
        self.run_dir = run_dir
        main = str(Path(__file__).parent.parent / "dlrm_main.py")
        self._log = (run_dir.parent / f"{run_dir.name}.log").open("ab")
        launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2"]
        launcher += ["--max-restarts", str(max_restarts), "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        launcher += ["--monitor-interval", "0.1"]
        data = ["--in_memory_binary_criteo_path", str(days), "--run_dir", str(run_dir)]
        self.process = subprocess.Popen(
            [*launcher, main, *flags, *data],
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [child for child in children if "dlrm_main.py" in " ".join(_command(child))]

    def has_begun(self) -> bool:
        """Whether it has written its first line of metrics."""
        return (self.run_dir / "metrics.jsonl").exists()

    def seconds_at_work(self) -> float:
        """Waits for the summary; gives the time since the first line of metrics."""
        while not self.has_begun() and self.process.poll() is None:
            time.sleep(0.01)
        started = time.monotonic()
        while not (self.run_dir / "summary.json").exists() and self.process.poll() is None:
            time.sleep(0.01)
        return time.monotonic() - started

    def wait(self) -> int:
        """Waits for the end; gives the exit code."""
        code = self.process.wait(SECONDS_FOR_A_RUN)
        self._log.close()
        return code


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill(kind: str, run: Run, generator: random.Random) -> bool:
    """Kills; False if there was nothing left to kill."""
    ranks = run.ranks()
    if run.process.poll() is not None or not ranks:
        return False
    victims = {"rank": [generator.choice(ranks)], "ranks": ranks, "launcher": [psutil.Process(run.process.pid)]}[kind]
    for victim in victims:
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return False
    return True


def outcome_of(run_dir: Path) -> dict[str, Any]:
    """Digests of the last checkpoint's tensors, and every loss and metric."""
    store = open_store(str(run_dir / "checkpoints"))
    newest = complete_checkpoints(store)[0]
    newest.verify(newest.manifest.files)
    tensors = {file: facts.sha256 for file, facts in newest.manifest.files.items() if file.endswith(".bin")}
    return {"step": newest.manifest.step, "tensors": tensors, "metrics": list(_metrics(run_dir))}


def _metrics(run_dir: Path) -> Iterator[tuple[Any, ...]]:
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] in ("train", "val", "test"):
            yield line["kind"], line["step"], line["num_train_samples"], line.get("loss"), line.get("logloss")


def try_once(kind: str, days: Path, run_dir: Path, wait: float, generator: random.Random) -> dict[str, Any]:
    """One run that is killed `wait` seconds after its first line, and started again until it finishes."""
    run = Run(days, run_dir, max_restarts=1 if kind == "rank" else 0)
    while not run.has_begun() and run.process.poll() is None:
        time.sleep(0.01)
    time.sleep(wait)
    killed = kill(kind, run, generator)
    partial = bool(list(run_dir.glob("checkpoints/.*.partial")))
    newest = max((path.name for path in run_dir.glob("checkpoints/step_*")), default=None)
    run.wait()
    starts = 1
    while not (finished := (run_dir / "summary.json").exists()) and starts < 4:
        run = Run(days, run_dir, max_restarts=0)
        run.wait()
        starts += 1
    facts = {"kind": kind, "seconds": round(wait, 3), "killed": killed, "while_writing": partial, "starts": starts}
    return {**facts, "newest": newest, "finished": finished, **outcome_of(run_dir)}


def main() -> int:
    """Kills at every kind's moments; prints a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--moments", type=positive_int, default=50, help="kills of each kind (default: %(default)s)")
    parser.add_argument("--kinds", type=some_of(*KINDS), default=",".join(KINDS), help="which (default: %(default)s)")
    parser.add_argument("--seed", type=between(0, 2**63 - 1), default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--json", type=result_file, help="where to write the result")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with folder_of_trainings() as folder:
        days = make_days(folder)
        undisturbed = Run(days, folder / "undisturbed", 0)
        length = undisturbed.seconds_at_work()
        assert undisturbed.wait() == 0, (folder / "undisturbed.log").read_text()
        expected = outcome_of(folder / "undisturbed")
        results: list[dict[str, Any]] = []
        for number in range(arguments.moments):
            for kind in arguments.kinds:
                killed = False
                while not killed:  # a moment after a run's end is drawn again
                    run_dir = folder / f"{kind}-{len(results)}"
                    result = try_once(kind, days, run_dir, generator.uniform(0.0, length), generator)
                    killed = result["killed"]
                    same = {part: result.pop(part) == expected[part] for part in ("step", "tensors", "metrics")}
                    result["same"] = all(same.values()) and result["finished"]
                    results.append(result)
                    verdict = "same" if result["same"] else f"DIFFERENT {same}"
                    where = f"{number + 1}/{arguments.moments} {kind:<9} after {result['seconds']:.2f} s"
                    print(f"{where}: {verdict if killed else 'had ended'}", flush=True)
                    if not result["same"]:
                        print(Path(f"{run_dir}.log").read_text()[-3000:])
    print(f"{'kind':<10}{'kills':>7}{'while writing':>15}{'same':>7}")
    for kind, count in Counter(result["kind"] for result in results if result["killed"]).items():
        own = [result for result in results if result["kind"] == kind and result["killed"]]
        writing, same_count = sum(r["while_writing"] for r in own), sum(r["same"] for r in own)
        print(f"{kind:<10}{count:>7}{writing:>15}{same_count:>7}")
    write_result(arguments.json, {"steps": 2 * STEPS, "flags": FLAGS, "runs": results})
    return 0 if all(result["same"] for result in results) else 1


if __name__ == "__main__":
    run_script(main)
