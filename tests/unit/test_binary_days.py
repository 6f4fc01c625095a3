import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from dlrm.dataset.binary_days import open_splits
from dlrm.dataset.manifest import MANIFEST_NAME, MANIFEST_VERSION
from dlrm.errors import DatasetError
from dlrm.schema.criteo import NUM_INTEGER_FEATURES

KAGGLE = {"names": ["train"]}


@pytest.fixture
def days(tmp_path, write_days) -> Path:
    """Three days of 5, 4 and 7 rows."""
    write_days(tmp_path / "days", [5, 4, 7])
    return tmp_path / "days"


def rows_of(splits, stage) -> list[int]:
    """Numbers of the rows in a split."""
    return splits[stage].read(0, splits[stage].num_rows).dense_BI[:, 0].astype(int).tolist()


@pytest.mark.parametrize(
    ("rows_per_day", "num_train", "num_val", "num_test"),
    [
        ([5, 4, 8], 9, 4, 4),
        ([5, 4, 7], 9, 4, 3),
        ([1, 2], 1, 1, 1),
        ([1, 0, 3], 1, 2, 1),
        ([3] * 11 + [5], 33, 3, 2),
    ],
)
def test_split_of_days(rows_per_day, num_train, num_val, num_test, tmp_path, write_days):
    """Eleven days and more: day_10 is after day_9, not after day_1."""
    write_days(tmp_path, rows_per_day)
    splits = open_splits(tmp_path, "criteo_1t")
    assert rows_of(splits, "train") == list(range(num_train))
    assert rows_of(splits, "val") == list(range(num_train, num_train + num_val))
    assert rows_of(splits, "test") == list(range(num_train + num_val, num_train + num_val + num_test))


def test_one_day_is_scored_but_not_trained_on(tmp_path, write_days):
    write_days(tmp_path, [5])
    splits = open_splits(tmp_path, "criteo_1t", needs_training=False)
    assert list(splits) == ["val", "test"]
    assert rows_of(splits, "val") + rows_of(splits, "test") == list(range(5))


def test_the_last_day_alone_is_scored_whatever_its_number(tmp_path, write_days):
    """As MLPerf's inference data has it; other days there, whole or not, are not looked at."""
    write_days(tmp_path, [5], names=["day_23"])
    with pytest.raises(DatasetError, match=r"one day only \(day_23\)"):
        open_splits(tmp_path, "criteo_1t")
    (tmp_path / "day_9_labels.npy").write_bytes(b"")
    splits = open_splits(tmp_path, "criteo_1t", needs_training=False)
    assert rows_of(splits, "val") + rows_of(splits, "test") == list(range(5))


def test_a_later_day_for_a_model_of_kaggle(tmp_path, write_days):
    write_days(tmp_path, [5])
    with pytest.raises(DatasetError, match=r"train_dense.npy: missing"):
        open_splits(tmp_path, "criteo_kaggle")
    splits = open_splits(tmp_path, "criteo_kaggle", needs_training=False)
    assert rows_of(splits, "val") + rows_of(splits, "test") == list(range(5))


def test_the_held_out_day_of_a_manifest_is_enough_to_score(tmp_path, write_days):
    write_days(tmp_path, [5, 4, 7])
    write_manifest(tmp_path, days={f"day_{day}": {} for day in range(3)})
    for path in (*tmp_path.glob("day_0_*"), *tmp_path.glob("day_1_*")):
        path.unlink()
    with pytest.raises(DatasetError, match=r"missing, though manifest.json lists it|one day only"):
        open_splits(tmp_path, "criteo_1t")
    assert open_splits(tmp_path, "criteo_1t", needs_training=False)["val"].num_rows == 4
    shutil.copy(tmp_path / "day_2_dense.npy", tmp_path / "day_1_dense.npy")
    for path in tmp_path.glob("day_2_*"):
        path.unlink()
    with pytest.raises(
        DatasetError, match=r"the last day there is day_1, and manifest.json says that day_2 is held out"
    ):
        open_splits(tmp_path, "criteo_1t", needs_training=False)


@pytest.mark.parametrize(
    ("num_rows", "num_train", "num_val"),
    [(70, 60, 5), (71, 60, 6), (76, 65, 6), (13, 11, 1), (3, 2, None)],
)
def test_split_of_kaggle(num_rows, num_train, num_val, tmp_path, write_days):
    write_days(tmp_path, [num_rows], **KAGGLE)
    if num_val is None:
        with pytest.raises(DatasetError, match="no rows to test on"):
            open_splits(tmp_path, "criteo_kaggle")
        return
    splits = open_splits(tmp_path, "criteo_kaggle")
    assert num_train == num_rows * 6 // 7
    assert rows_of(splits, "train") == list(range(num_train))
    assert rows_of(splits, "val") == list(range(num_train, num_train + num_val))
    assert rows_of(splits, "test") == list(range(num_train + num_val, num_rows))


@pytest.mark.parametrize(
    ("rows_per_day", "stage"), [([3, 1], "test"), ([3, 0], "val"), ([0, 4], "train"), ([0, 0, 4], "train")]
)
def test_a_split_without_rows_is_refused(rows_per_day, stage, tmp_path, write_days):
    write_days(tmp_path, rows_per_day)
    with pytest.raises(DatasetError, match=f"no rows to {stage} on"):
        open_splits(tmp_path, "criteo_1t")


@pytest.mark.parametrize(("sparse_dtype", "max_id"), [(np.int32, 2**31 - 1), (np.int64, 2**32 - 1), (np.int64, 2**60)])
def test_values_are_read_exactly(sparse_dtype, max_id, tmp_path, write_days):
    """In training and held-out rows alike. torchrec's own shuffle passes ids through float32: exact to 2^24 only."""
    written = write_days(tmp_path, [5, 4, 7], sparse_dtype=sparse_dtype, max_id=max_id)
    splits = open_splits(tmp_path, "criteo_1t")
    parts = [splits[stage].read(0, splits[stage].num_rows) for stage in ("train", "val", "test")]
    assert written.ids_BN.max() > 2**24
    for part in ("dense_BI", "ids_BN", "labels_B"):
        read = np.concatenate([getattr(rows, part) for rows in parts])
        assert read.dtype == getattr(written, part).dtype
        np.testing.assert_array_equal(read, getattr(written, part))


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (4, 5), (4, 6), (0, 12), (3, 11), (9, 12), (12, 12)])
def test_ranges_over_days(start, stop, tmp_path, write_days):
    written = write_days(tmp_path, [5, 0, 4, 3, 2])
    rows = open_splits(tmp_path, "criteo_1t")["train"].read(start, stop)
    assert rows.dense_BI.shape == (stop - start, NUM_INTEGER_FEATURES)
    np.testing.assert_array_equal(rows.dense_BI, written.dense_BI[start:stop])
    np.testing.assert_array_equal(rows.ids_BN, written.ids_BN[start:stop])
    np.testing.assert_array_equal(rows.labels_B, written.labels_B[start:stop])


def test_what_is_read_is_a_copy(days):
    rows = open_splits(days, "criteo_1t")["train"].read(0, 3)
    rows.dense_BI[:] = 0
    rows.ids_BN[:] = 0
    assert open_splits(days, "criteo_1t")["train"].read(0, 3).ids_BN.any()


def save(path: Path, array: np.ndarray, **options: object) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, **options)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def write_manifest(folder: Path, **change: object) -> None:
    files = {path.name: {"bytes": path.stat().st_size} for path in folder.glob("*.npy")}
    (folder / MANIFEST_NAME).write_text(json.dumps({"version": MANIFEST_VERSION, "files": files, **change}))


FAULTS = {
    "no folder": (lambda f: shutil.rmtree(f), "days: no such folder"),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "days: no day_0_dense.npy"),
    "ids of dlrm materialize": (
        lambda f: [path.unlink() for path in f.iterdir()] + [(f / "day_0_sparse_multi_hot.npz").touch()],
        "days: holds only ids, .* as --synthetic_multi_hot_criteo_path, and the days .* as --in_memory_binary_criteo",
    ),
    "one day": (lambda f: [path.unlink() for path in f.glob("day_[12]*")], r"one day only \(day_0\)"),
    "a gap": (lambda f: [path.unlink() for path in f.glob("day_1*")], "day_1_dense.npy is missing"),
    "no day 0": (lambda f: [path.unlink() for path in f.glob("day_0*")], "day_0_dense.npy is missing"),
    "day 3 of 5": (
        lambda f: [save(f / f"day_4_{part}.npy", np.zeros(1)) for part in ("dense", "sparse", "labels")],
        "day_3_dense.npy is missing, with days up to 4",
    ),
    "no labels": (lambda f: (f / "day_2_labels.npy").unlink(), "day_2_labels.npy: missing"),
    "no dense": (lambda f: (f / "day_2_dense.npy").unlink(), "day_2_dense.npy: missing"),
    "row counts": (
        lambda f: save(f / "day_1_labels.npy", np.zeros((3, 1), np.int32)),
        "day_1_labels.npy: 3 rows, expected 4 as in day_1_dense.npy",
    ),
    "cut in the rows": (lambda f: cut(f / "day_1_sparse.npy", 500), "day_1_sparse.npy: 500 bytes, expected 544"),
    "cut in the header": (lambda f: cut(f / "day_1_sparse.npy", 60), "day_1_sparse.npy: not a readable .npy file"),
    "empty file": (lambda f: cut(f / "day_1_dense.npy", 0), "day_1_dense.npy: not a readable .npy file"),
    "a longer file": (
        lambda f: (f / "day_1_labels.npy").write_bytes((f / "day_1_labels.npy").read_bytes() + b"0"),
        "day_1_labels.npy: 145 bytes, expected 144",
    ),
    "not npy": (lambda f: (f / "day_1_dense.npy").write_text("dense\n" * 50), "day_1_dense.npy: not a readable .npy"),
    "a folder": (
        lambda f: ((f / "day_1_dense.npy").unlink(), (f / "day_1_dense.npy").mkdir()),
        "day_1_dense.npy: not a regular file",
    ),
    "float64": (
        lambda f: save(f / "day_1_dense.npy", np.zeros((4, 13))),
        "day_1_dense.npy: dtype float64, expected float32",
    ),
    "float ids": (
        lambda f: save(f / "day_1_sparse.npy", np.zeros((4, 26), np.float32)),
        "day_1_sparse.npy: dtype float32, expected int32 or int64",
    ),
    "objects": (
        lambda f: save(f / "day_1_labels.npy", np.zeros((4, 1), object)),
        "day_1_labels.npy: dtype object, expected int32",
    ),
    "byte order": (
        lambda f: save(f / "day_1_dense.npy", np.zeros((4, 13), ">f4")),
        "day_1_dense.npy: dtype (?!float32, expected float32)",
    ),
    "columns": (
        lambda f: save(f / "day_1_dense.npy", np.zeros((4, 12), np.float32)),
        r"day_1_dense.npy: shape \[4, 12\], expected \[rows, 13\]",
    ),
    "one axis": (
        lambda f: save(f / "day_1_labels.npy", np.zeros(4, np.int32)),
        r"day_1_labels.npy: shape \[4\], expected \[rows, 1\]",
    ),
    "column order": (
        lambda f: save(f / "day_1_dense.npy", np.zeros((4, 13), np.float32, order="F")),
        r"day_1_dense.npy: shape \[4, 13\] in column order",
    ),
    "manifest of another version": (
        lambda f: write_manifest(f, version=MANIFEST_VERSION + 1),
        f"{MANIFEST_NAME}: version {MANIFEST_VERSION + 1}, this dlrm reads {MANIFEST_VERSION}",
    ),
    "manifest of another size": (
        lambda f: write_manifest(f, files={"day_1_dense.npy": {"bytes": 1234}}),
        f"day_1_dense.npy: 336 bytes, expected 1,234 as {MANIFEST_NAME} states",
    ),
    "manifest of a missing file": (
        lambda f: write_manifest(f, files={"day_3_dense.npy": {"bytes": 1234}}),
        f"day_3_dense.npy: missing, though {MANIFEST_NAME} lists it",
    ),
    "broken manifest": (lambda f: (f / MANIFEST_NAME).write_text('{"version": 1,'), f"{MANIFEST_NAME}: not a manifest"),
    "manifest is a list": (lambda f: (f / MANIFEST_NAME).write_text("[]"), f"{MANIFEST_NAME}: not a manifest"),
    "manifest without files": (lambda f: write_manifest(f, files=None), f"{MANIFEST_NAME}: not a manifest"),
    "manifest with text for a size": (
        lambda f: write_manifest(f, files={"day_1_dense.npy": {"bytes": "1234"}}),
        f"{MANIFEST_NAME}|day_1_dense.npy",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_refused(fault, days):
    damage, words = FAULTS[fault]
    damage(days)
    with pytest.raises(DatasetError, match=words) as caught:
        open_splits(days, "criteo_1t")
    assert str(days) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kaggle_files_that_are_not_there(days):
    with pytest.raises(DatasetError, match=r"train_dense.npy: missing. Expected an array of float32 \[rows, 13\]"):
        open_splits(days, "criteo_kaggle")


def test_a_damaged_header_is_refused_or_harmless(tmp_path, write_days):
    """Every byte of a header, changed in several ways: never a traceback."""
    write_days(tmp_path, [20], **KAGGLE)
    path = tmp_path / "train_dense.npy"
    whole = path.read_bytes()
    refused = 0
    warnings.simplefilter("ignore")  # numpy's, at headers that look like those of Python 2; pytest restores the filters
    for position in range(128):
        for byte in {whole[position] ^ 0x80, *b"(',b0"} - {whole[position]}:
            path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            try:
                open_splits(tmp_path, "criteo_kaggle")
            except DatasetError as error:
                assert str(path) in str(error)  # noqa: PT017 - a header may also stay readable
                refused += 1
    assert refused > 300


def test_a_sound_manifest_is_accepted(days):
    write_manifest(days)
    assert open_splits(days, "criteo_1t")["train"].num_rows == 9


@pytest.mark.parametrize(
    ("part", "dtype", "column", "value", "words"),
    [
        ("dense", np.float32, 12, np.nan, "nan at row 2, column 12, expected a finite number"),
        ("dense", np.float32, 0, np.inf, "inf at row 2, column 0, expected a finite number"),
        ("dense", np.float32, 0, -np.inf, "-inf at row 2, column 0, expected a finite number"),
        ("sparse", np.int32, 25, -1, "id -1 at row 2, column 25, expected 0 or more"),
        ("sparse", np.int64, 3, -(2**40), f"id -{2**40} at row 2, column 3, expected 0 or more"),
        ("labels", np.int32, 0, 7, "label 7 at row 2, expected 0 or 1"),
        ("labels", np.int32, 0, -1, "label -1 at row 2, expected 0 or 1"),
    ],
)
@pytest.mark.parametrize(("day", "stage", "start"), [(1, "train", 6), (2, "val", 1)])
def test_a_wrong_value_is_told_with_file_and_row(day, stage, start, part, dtype, column, value, words, days):
    path = days / f"day_{day}_{part}.npy"
    array = np.load(path).astype(dtype)
    array[2, column] = value
    np.save(path, array)
    rows = open_splits(days, "criteo_1t")[stage]
    with pytest.raises(DatasetError, match=f"^{path}: {words}"):
        rows.read(start, start + 3)
    row = 2 + {1: 5, 2: 0}[day]
    assert len(rows.read(0, row).labels_B) == row
    with pytest.raises(DatasetError, match=words):
        rows.read(row, row + 1)
