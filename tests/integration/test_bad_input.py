"""Each mistake: one clear line, exit code 2, nothing written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.test_faults import write_days
from tests.launching import TINY, run_main


def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        np.save(folder / name, change(np.load(folder / name)))

    return apply


def put(row: int, column: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def apply(array: np.ndarray) -> np.ndarray:
        array[row, column] = value
        return array

    return apply


def truncate(folder: Path) -> None:
    path = folder / "day_1_sparse.npy"
    path.write_bytes(path.read_bytes()[:-100])


BAD_DATA = {
    "day missing": (lambda folder: [p.unlink() for p in folder.glob("day_3_*")], "day_3_dense.npy is missing"),
    "rows differ": (edit("day_1_labels.npy", lambda a: a[:-1]), "day_1_labels.npy: 19 rows, expected 20"),
    "truncated": (truncate, "day_1_sparse.npy: 2,108 bytes, expected 2,208"),
    "dtype": (edit("day_0_dense.npy", lambda a: a.astype(np.float64)), "dtype float64, expected float32"),
    "nan": (edit("day_2_dense.npy", put(7, 4, np.nan)), "day_2_dense.npy: nan at row 7, column 4"),
    "label": (edit("day_4_labels.npy", put(3, 0, 7)), "day_4_labels.npy: label 7 at row 3, expected 0 or 1"),
    "negative id": (edit("day_0_sparse.npy", put(1, 25, -5)), "day_0_sparse.npy: id -5 at row 1, column 25"),
}


def assert_refused(flags: list[str], words: str, run_dir: Path) -> None:
    done = run_main(*TINY, *flags, *(() if "--run_dir" in flags else ("--run_dir", str(run_dir))))
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("dlrm: error: ")
    assert words in errors[0]
    assert not run_dir.exists()


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(tmp_path: Path, case: str) -> None:
    break_data, words = BAD_DATA[case]
    write_days(tmp_path / "days", (20,) * 5)
    break_data(tmp_path / "days")
    assert_refused(["--in_memory_binary_criteo_path", str(tmp_path / "days")], words, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--in_memory_binary_criteo_path", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--embedding_dim", "12"], "--dense_arch_layer_sizes ends in 8, expected embedding_dim, which is 12"),
        (["--num_embeddings_per_feature", ",".join(["9"] * 25)], "got 25 sizes, expected 26"),
        (["--batch_size", "0"], "--batch_size 0: expected more than 0"),
        (["--run_dir", "/dev/null/run"], "--run_dir /dev/null/run: /dev/null is not a folder"),
        (["--run_dir", "/proc/run"], "/proc/run: can't be written"),
        (["--num_embeddings", "2000000000"], "GiB more, optimizer state and buffers included"),
    ],
)
def test_bad_flags(tmp_path: Path, flags: list[str], words: str) -> None:
    if flags[0] == "--num_embeddings_per_feature":
        flags = [*flags, "--num_embeddings", "100000"]
    assert_refused(flags, words, tmp_path / "run")


def test_a_run_directory_that_holds_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("mine")
    done = run_main(*TINY, "--run_dir", str(tmp_path / "run"), "--resume", "never")
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert (tmp_path / "run" / "config.json").read_text() == "mine"
