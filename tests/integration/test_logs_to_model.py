"""From raw logs to a trained model, with the commands that the README gives."""

import json
from pathlib import Path

import pytest

from tests.launching import BIN, read_summary, run, run_main


def dlrm(*arguments: str) -> str:
    done = run([str(BIN / "dlrm"), *arguments])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_planted_logs_come_near_their_best_auroc(tmp_path: Path) -> None:
    raw, days = tmp_path / "raw", tmp_path / "days with a space"
    dlrm("synthesize", str(raw), "--rows", "60000", "--days", "3", "--click_rate", "0.25")
    truth = json.loads((raw / "truth.json").read_text())
    files = [str(raw / f"day_{i}.tsv") for i in range(3)]
    assert "60,000 rows" in dlrm("preprocess", *files, "--output", str(days))
    flags = ["--recipe", "debug_cpu", "--in_memory_binary_criteo_path", str(days), "--run_dir", str(tmp_path / "run")]
    done = run_main(*flags, ranks=2)
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "run")
    assert summary["num_test_samples"] == 10_000
    assert 0.74 < summary["test_auroc"] < truth["test_auroc"] < 0.87


@pytest.mark.criteo
def test_real_rows_reach_the_auroc_of_the_log(tmp_path: Path, criteo_folder: Path) -> None:
    """Five seeds gave 0.7589 to 0.7607 (LOG.md); the plain example has 0.7564."""
    days = tmp_path / "days"
    dlrm(
        *("preprocess", str(criteo_folder / "kaggle_120k.tsv.zst"), "--dataset_name", "criteo_kaggle"),
        *("--output", str(days)),
    )
    flags = ["--in_memory_binary_criteo_path", str(days), "--run_dir", str(tmp_path / "run"), "--seed", "0"]
    done = run_main("--recipe", "kaggle_sample", *flags, timeout=800)
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "run")
    assert (summary["num_train_samples"], summary["num_test_samples"]) == (102_857, 8_571)
    assert (summary["val_auroc"][0] + summary["test_auroc"]) / 2 > 0.757


@pytest.mark.criteo
def test_rows_of_the_1tb_logs_are_read(tmp_path: Path, criteo_folder: Path) -> None:
    raw = str(criteo_folder / "day_0_10k.tsv.gz")
    twice = ("--repeated_rows", "allow")
    assert "20,000 rows" in dlrm("preprocess", raw, raw, *twice, "--output", str(tmp_path / "days"))
