"""Command lines of the scripts in benchmarks/: what is refused before any work begins, and how a script ends."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dlrm.errors import ConfigError, DlrmError
from tests.launching import ROOT, wait_until

WITH_RESULTS = {
    "calibrate": [],
    "kills": [],
    "neighbour": [],
    "overlap": [],
    "planted": [],
    "plans": [],
    "preprocess": ["memory"],
    "quality": ["--data", "days"],
    "scaling": [],
    "soak": [],
    "startup": [],
    "step_profile": [],
}
"""Scripts that write one, and flags that they need."""


def call(script: str, *flags: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("sys.argv", [f"benchmarks/{script}.py", *flags])
    importlib.import_module(f"benchmarks.{script}").main()


def test_every_script_that_writes_a_result_is_here() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "write_result(" in path.read_text()}
    assert scripts == WITH_RESULTS.keys()


@pytest.mark.parametrize("script", WITH_RESULTS)
def test_a_result_that_cannot_be_written(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "is a device or a pipe"),
        (Path("/proc/r.json"), "No such file or directory"),
    ):
        with pytest.raises(ConfigError, match=rf"^--json {path}: can't be written \({why}\)\."):
            call(script, *WITH_RESULTS[script], "--json", str(path), patch=monkeypatch)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("soak", "--minutes -1", "--minutes: got -1, expected a number from 0.5 to 1,000,000.0"),
        ("soak", "--minutes nan", "--minutes: got nan, expected a number"),
        ("soak", "--minutes inf", "--minutes: got inf, expected a number"),
        ("soak", "--minutes 0.4", "--minutes: got 0.4, expected a number"),
        ("soak", "--minutes ten", "--minutes: got ten, expected a number"),
        ("soak", "--minute 1", "unrecognized arguments: --minute 1"),
        ("kills", "--kinds nope", "--kinds: got 'nope', expected some of rank,ranks,launcher"),
        ("kills", "--kinds rank,rank", "--kinds: got rank,rank, expected each once"),
        ("kills", "--moments 0", "--moments: got 0, expected a whole number from 1"),
        ("kills", "--moments 1.5", "--moments: got 1.5, expected a whole number from 1"),
        ("kills", "--seed -1", "--seed: got -1, expected a whole number from 0"),
        ("overlap", "--ranks 1", "--ranks: got 1, expected a whole number from 2"),
        ("overlap", "--ranks 1024", "--ranks 1024: this machine has"),
        ("overlap", "--rounds 0", "--rounds: got 0"),
        ("overlap", "--steps 0", "--steps: got 0"),
        ("overlap", "--batch_size nan", "--batch_size: got nan"),
        ("overlap", "--num_embeddings 2147483648", "--num_embeddings: got 2147483648"),
        ("preprocess", "memory --millions 0", "--millions: got 0, expected a whole number from 1 to 2,000"),
        ("preprocess", "kills --rows 2", "--rows: got 2, expected a whole number from 3"),
        ("preprocess", "kills --count -1", "--count: got -1"),
        ("scaling", "--planner_ranks -8", "--planner_ranks: got -8, expected a whole number from 0 to 4,096"),
        ("startup", "--rounds inf", "--rounds: got inf"),
        ("startup", "--batch_size 3", "--batch_size: got 3, expected an even number"),
        ("step_profile", "--rounds 0", "--rounds: got 0"),
        ("step_profile", "--optimizer adm", "--optimizer: invalid choice: 'adm'"),
        ("step_profile", "--precision fp8", "--precision: invalid choice: 'fp8'"),
        ("gpu", "--dry_run --budget_seconds nan", "--budget_seconds: got nan, expected a number from 1.0"),
        ("gpu", "--dry_run --out /proc/gpu", "--out /proc/gpu/gpu.json: can't be written"),
        ("quality", "--data gone", "gone: no such folder"),
        ("quality", "--data {days}", "{days}: no day_0_dense.npy"),
        ("quality", "--data {days} --seeds 0,x", "--seeds: invalid"),
        ("quality", "--data {days} --seeds 1,1", "--seeds: got 1,1, expected each once"),
        ("quality", "--data {days} -- --epochs 0", "--epochs 0: expected more than 0"),
        ("quality", "--data {days} -- --seed 3", "--seed after --: this script sets it"),
        (
            "quality",
            "--data {days} -- --no_evaluate_on_training_end",
            "-- --no_evaluate_on_training_end: leaves val or",
        ),
    ],
)
def test_mistakes(script: str, flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DlrmError, match=f"^{re.escape(words.format(days=tmp_path))}"):
        call(script, *flags.format(days=tmp_path).split(), patch=monkeypatch)


ENDS = """
import subprocess, sys, time
from benchmarks.flags import run_script
from benchmarks.kills import folder_of_trainings

def main():
    with folder_of_trainings() as folder:
        sleep = [sys.executable, "-c", "import time; time.sleep(600)", "--run_dir"]
        for name in (folder / "run", folder.parent / "other"):
            # By way of a shell that ends, so that it is nobody's child, as ranks are whose torchrun was killed.
            subprocess.run(["sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", *sleep, str(name)], check=True)
        print(folder, flush=True)
        time.sleep(600)

run_script(main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_trainings_too(number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", ENDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as script:
        assert script.stdout is not None
        training, other, folder = (script.stdout.readline().strip() for _ in range(3))
        try:
            wait_until(lambda: "--run_dir" in psutil.Process(int(training)).cmdline())
            script.send_signal(number)
            _, err = script.communicate(timeout=60)
            assert script.returncode == code
            assert err == ("benchmarks.-c: interrupted.\n" if number == signal.SIGINT else "")
            assert not Path(folder).exists()
            assert not is_running(training)
            assert is_running(other)
        finally:
            script.kill()
            for left in filter(is_running, (training, other)):
                os.kill(int(left), signal.SIGKILL)


def is_running(pid: str) -> bool:
    return psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE


def test_a_command_that_fails_is_one_line() -> None:
    code = (
        "import subprocess, sys\nfrom benchmarks.flags import run_script\n"
        "run_script(lambda: subprocess.run([sys.executable, '-c', 'raise SystemExit(5)'], check=True))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"benchmarks.-c: error: `.*raise SystemExit\(5\).*` ended with 5\n", done.stderr)
