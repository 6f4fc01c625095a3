"""The commands that look at, score, export and compare what a training has left, started as users do."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_faults import write_days
from tests.launching import BIN, TINY, read_summary, run, run_main

USER_ERROR = 2


def dlrm(*arguments: str, ranks: int = 1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--rdzv_backend", "c10d"]
        launcher += ["--rdzv_endpoint", "localhost:0"]
    return run([*launcher, "-m", "dlrm.cli", *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("commands")
    write_days(folder / "days", (200, 101))
    write_days(folder / "other", (33,))
    flags = ["--in_memory_binary_criteo_path", str(folder / "days"), "--batch_size", "16", "--adagrad"]
    done = run_main(*TINY, *flags, "--checkpoint_every", "5", "--run_dir", str(folder / "a run"))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluate(trained: Path, ranks: int, tmp_path: Path) -> None:
    scores = tmp_path / "new" / "scores.json"
    done = dlrm("evaluate", "--checkpoint", str(trained / "a run"), "--json", str(scores), ranks=ranks)
    assert done.returncode == 0, done.stderr
    summary, found = read_summary(trained / "a run"), json.loads(scores.read_text())
    assert found["val"]["auroc"] == pytest.approx(summary["val_auroc"][-1], abs=1e-6)
    assert found["test"]["logloss"] == pytest.approx(summary["test_logloss"], abs=1e-6)
    assert f"AUROC over val set: {summary['val_auroc'][-1]:.6f} | " in done.stdout
    assert done.stdout.count("AUROC over test set: ") == 1
    assert "The data is not" not in done.stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "scores.json"]


def test_evaluate_on_another_day_and_limits(trained: Path) -> None:
    other = ["--in_memory_binary_criteo_path", str(trained / "other"), "--split", "test", "--limit_test_batches", "1"]
    done = dlrm("evaluate", "--checkpoint", str(trained / "a run"), *other, "--test_batch_size", "8", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert "The data is not what the checkpoint was trained on" in done.stderr
    assert "AUROC over val set" not in done.stderr
    assert "| 8 samples, " in done.stderr
    assert json.loads(done.stdout)["test"]["num_samples"] == 8  # and nothing else


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_embeddings", "65"], "written with --num_embeddings 64 (here 65)"),
        (["--in_memory_binary_criteo_path", "gone"], "gone: no such folder"),
    ],
)
def test_mistakes_on_two_ranks_are_told_once(trained: Path, flags: list[str], words: str) -> None:
    done = dlrm("evaluate", "--checkpoint", str(trained / "a run"), *flags, ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("dlrm: error") == 1
    assert words in done.stderr


def test_looking_exporting_comparing(trained: Path, tmp_path: Path) -> None:
    address = str(trained / "a run")
    done = dlrm("inspect", address, "--verify")
    assert done.returncode == 0, done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines() if line.startswith("t_cat_25")] == [
        ["t_cat_25", "64", "8"]
    ]
    assert dlrm("export-table", address, "t_cat_25", str(tmp_path / "out.npy")).returncode == 0
    assert np.load(tmp_path / "out.npy").shape == (64, 8)
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()
    done = dlrm("compare", address, f"{address}/checkpoints/step_0000000010", "--json")
    assert json.loads(done.stdout)["config"]["differing"] == {}
    done = dlrm("inspect", str(trained / "nowhere"))
    assert done.returncode == USER_ERROR
    assert done.stderr.count("\n") == 1
