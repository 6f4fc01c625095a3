"""A rank in trouble: the job ends within seconds, and its own error is what the user reads."""

from pathlib import Path

import numpy as np
import pytest

from tests.launching import TINY, read_summary, run_main

ROWS = 64


def write_days(folder: Path, rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for day, count in enumerate(rows):
        dense = rng.random((count, 13), dtype=np.float32)
        np.save(folder / f"day_{day}_dense.npy", dense)
        np.save(folder / f"day_{day}_sparse.npy", rng.integers(0, 1000, (count, 26), dtype=np.int32))
        np.save(folder / f"day_{day}_labels.npy", (dense[:, :1] > 0.5).astype(np.int32))


def poison(folder: Path, row: int) -> None:
    path = folder / "day_0_dense.npy"
    dense = np.load(path)
    dense[row, 3] = np.nan
    np.save(path, dense)


def test_bad_data_on_one_rank_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    write_days(tmp_path / "days", (ROWS, ROWS))
    poison(tmp_path / "days", row=9)  # rank 1's half of the second batch of 2 x 4
    flags = ["--in_memory_binary_criteo_path", str(tmp_path / "days"), "--batch_size", "4"]
    done = run_main(*TINY, *flags, "--run_dir", str(tmp_path / "run"), ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("dlrm: error") == 1
    assert "day_0_dense.npy: nan at row 9, column 3" in done.stderr
    assert "Traceback" not in done.stderr.split("ChildFailedError")[0].split("torch/distributed/elastic")[0]
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_in_mid_run_ends_the_job_and_is_the_one_named(tmp_path: Path) -> None:
    write_days(tmp_path / "days", (4096, ROWS))
    poison(tmp_path / "days", row=1006)
    flags = ["--in_memory_binary_criteo_path", str(tmp_path / "days"), "--batch_size", "4", "--mmap_mode"]
    done = run_main(*TINY, *flags, "--run_dir", str(tmp_path / "run"), ranks=2)  # gloo's own limit is 30 minutes
    assert done.returncode != 0
    assert done.stderr.count("dlrm: error") == 1
    assert "dlrm: error (rank 1): " in done.stderr
    assert "nan at row 1006" in done.stderr


@pytest.mark.parametrize(("rows", "expected"), [((5, 1 + 2), (5, 2, 1)), ((17, 2), (17, 1, 1)), ((33, 13), (33, 7, 6))])
def test_every_held_out_row_is_scored_once_however_few_there_are(
    tmp_path: Path, rows: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    write_days(tmp_path / "days", rows)
    flags = ["--in_memory_binary_criteo_path", str(tmp_path / "days"), "--batch_size", "4"]
    done = run_main(*TINY, *flags, "--run_dir", str(tmp_path / "run"), ranks=2)
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "run")
    train, val, test = expected
    assert summary["num_train_samples"] == train
    assert summary["num_test_samples"] == test
    assert f"| {val:,} samples" in done.stdout.split("AUROC over val set")[1].splitlines()[0]
