"""`dlrm verify` of binary days without a manifest, and of lists of checksums."""

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dlrm import cli
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES


@pytest.fixture
def days(tmp_path, write_days) -> Path:
    write_days(tmp_path / "days", (50, 40), max_id=1000)
    return tmp_path / "days"


def verify(folder: Path, *flags: str) -> int:
    return cli.main(["verify", str(folder), *flags])


def refusal(capsys, folder: Path, *flags: str) -> str:
    """The one line that it ends with."""
    capsys.readouterr()
    assert verify(folder, *flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def write_multi_hot(path: Path, rows: int, **changes: np.ndarray) -> None:
    members = {str(feature): np.full((rows, 2), feature, np.int32) for feature in range(NUM_CATEGORICAL_FEATURES)}
    np.savez(path, **{**members, **changes})


def test_days_without_a_manifest(days, capsys):
    assert verify(days) == 0
    labels = np.load(days / "day_0_labels.npy")
    ids = np.concatenate([np.load(days / f"day_{day}_sparse.npy") for day in range(2)])
    lines = capsys.readouterr().out.splitlines()
    largest = np.load(days / "day_0_sparse.npy").max()
    assert lines[0] == f"day_0: 50 rows, {labels.mean():.2%} positive, ids up to {largest:,}"
    assert lines[1].startswith("day_1: 40 rows, ")
    assert lines[-1] == f"--num_embeddings_per_feature {','.join(map(str, ids.max(axis=0) + 1))}"


def test_a_last_day_alone_and_ids_of_64_bits(tmp_path, write_days, capsys):
    write_days(tmp_path, (30,), names=["day_23"], sparse_dtype=np.int64, max_id=2**40)
    assert verify(tmp_path) == 0
    assert capsys.readouterr().out.startswith("day_23: 30 rows, ")
    write_days(tmp_path / "kaggle", (30,), names=["train"])
    assert verify(tmp_path / "kaggle") == 0
    assert capsys.readouterr().out.startswith("train: 30 rows, ")


def change(path: Path, row: int, column: int, value: float) -> None:
    array = np.load(path)
    array[row, column] = value
    np.save(path, array)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("dense", np.nan, "day_1_dense.npy: nan at row 7, column 0, expected a finite number"),
        ("sparse", -3, "day_1_sparse.npy: -3 at row 7, column 0, expected 0 or more"),
        ("labels", 2, "day_1_labels.npy: 2 at row 7, column 0, expected 0 or 1"),
        ("labels", -1, "day_1_labels.npy: -1 at row 7, column 0, expected 0 or 1"),
    ],
)
def test_values_that_cannot_be(part, value, words, days, capsys):
    change(days / f"day_1_{part}.npy", 7, 0, value)
    assert words in refusal(capsys, days)


def test_files_that_do_not_belong_together(days, capsys):
    np.save(days / "day_1_labels.npy", np.zeros((39, 1), np.int32))
    assert "day_1_labels.npy: int32 [39, 1], expected int32 [40, 1]" in refusal(capsys, days)
    np.save(days / "day_1_labels.npy", np.zeros((40, 1), np.int64))
    assert "day_1_labels.npy: int64 [40, 1], expected int32 [40, 1]" in refusal(capsys, days)
    (days / "day_1_labels.npy").write_bytes(b"no array")
    assert "day_1_labels.npy: not a readable .npy file" in refusal(capsys, days)
    (days / "day_1_labels.npy").unlink()
    assert "day_1_labels.npy: missing. Expected dense, sparse and labels of each day" in refusal(capsys, days)
    for part in ("dense", "sparse"):
        (days / f"day_1_{part}.npy").rename(days / f"day_3_{part}.npy")
    assert "has day_0 and day_3, and no day_1" in refusal(capsys, days)


def test_a_folder_of_something_else(tmp_path, capsys):
    assert "has neither manifest.json nor binary days" in refusal(capsys, tmp_path)
    assert "no such folder" in refusal(capsys, tmp_path / "absent")


def test_multi_hot_days(days, capsys):
    for day, rows in enumerate((50, 40)):
        (days / f"day_{day}_sparse.npy").unlink()
        write_multi_hot(days / f"day_{day}_sparse_multi_hot.npz", rows)
    assert verify(days) == 0
    assert f"--num_embeddings_per_feature {','.join(map(str, range(1, 27)))}" in capsys.readouterr().out
    write_multi_hot(days / "day_1_sparse_multi_hot.npz", 40, **{"4": np.full((40, 3), -7, np.int32)})
    assert "id -7 at row 0, column 0 of member 4, expected 0 or more" in refusal(capsys, days)
    write_multi_hot(days / "day_1_sparse_multi_hot.npz", 40, **{"4": np.zeros((41, 3), np.int32)})
    assert "member 4 has 41 rows, expected 40" in refusal(capsys, days)
    write_multi_hot(days / "day_1_sparse_multi_hot.npz", 40, **{"26": np.zeros((40, 3), np.int32)})
    assert "has a member '26', expected 0 to 25 and no other" in refusal(capsys, days)


def list_of(algorithm: str, days: Path, prefix: str = "") -> str:
    return "".join(
        f"{hashlib.new(algorithm, path.read_bytes()).hexdigest()}  {prefix}{path.name}\n"
        for path in sorted(days.glob("*.npy"))
    )


@pytest.mark.parametrize("prefix", ["", "./", "numpy_contiguous_shuffled_output_dataset_dir/"])
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [("md5sums.txt", "md5"), ("sha256sums.txt", "sha256"), ("SHA256SUMS", "sha256"), ("md5sums_criteo.txt", "md5")],
)
def test_lists_of_checksums_in_the_folder_count(name, algorithm, prefix, days, capsys):
    (days / name).write_text(list_of(algorithm, days, prefix))
    assert verify(days) == 0
    assert capsys.readouterr().out.endswith(f"{days}: 6 files as in {days / name}\n")
    change(days / "day_1_dense.npy", 3, 3, 0.125)
    assert f"day_1_dense.npy: {algorithm} " in refusal(capsys, days)
    (days / "day_1_dense.npy").unlink()
    assert f"day_1_dense.npy: missing, though {days / name} lists it" in refusal(capsys, days)


def test_a_list_of_all_days_beside_the_last_one_alone(days, capsys):
    for part in ("dense", "sparse", "labels"):
        (days / f"day_0_{part}.npy").rename(days / f"day_3_{part}.npy")
        (days / f"day_1_{part}.npy").rename(days / f"day_4_{part}.npy")
    (days / "md5sums.txt").write_text(list_of("md5", days))
    for path in days.glob("day_3_*"):
        path.unlink()
    assert verify(days) == 0
    assert capsys.readouterr().out.endswith(f"{days}: 3 files as in {days / 'md5sums.txt'}\n")
    for path in days.glob("day_4_*"):
        path.rename(days / path.name.replace("day_4", "day_3"))
    assert "day_4_dense.npy: missing, though" in refusal(capsys, days)


def test_a_list_beside_the_folder_and_what_md5sum_itself_writes(days, tmp_path, capsys):
    (days / "notes").write_text("other files may be listed too")
    names = sorted(path.name for path in days.iterdir())
    written = subprocess.run(["md5sum", *names], cwd=days, capture_output=True, text=True, check=True).stdout
    (tmp_path / "list").write_text(written)
    assert verify(days, "--sums", str(tmp_path / "list")) == 0
    assert "7 files as in" in capsys.readouterr().out
    written = subprocess.run(
        ["sha256sum", "--tag", *names], cwd=days, capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "list").write_text("# published\n\n" + written.replace("notes", "absent"))
    assert f"absent: missing, though {tmp_path / 'list'} lists it" in refusal(
        capsys, days, "--sums", str(tmp_path / "list")
    )
    (days / "notes").write_text("changed")
    (tmp_path / "list").write_text(written)
    assert "notes: sha256 " in refusal(capsys, days, "--sums", str(tmp_path / "list"))
    (tmp_path / "list").write_text("no list\n")
    assert "list: line 1 is not a checksum and a name" in refusal(capsys, days, "--sums", str(tmp_path / "list"))
    (tmp_path / "list").write_text("")
    assert "list: lists no file" in refusal(capsys, days, "--sums", str(tmp_path / "list"))
    assert "nowhere: can't be read" in refusal(capsys, days, "--sums", str(tmp_path / "nowhere"))
