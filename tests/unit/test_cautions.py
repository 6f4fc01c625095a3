"""What is said of days before a run begins, and rows that are checked where they stay on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from dlrm.dataset.binary_days import open_splits
from dlrm.dataset.cautions import compare_folded, describe_days, find_copies, measure_each_part, note_unknown_folding
from dlrm.dataset.manifest import MANIFEST_NAME, MANIFEST_VERSION
from dlrm.errors import DatasetError
from dlrm.loader.run_data import RunData, build_splits
from tests.unit.test_splits import config_of, runtime_of

TABLE_ROWS = np.full(26, 1000)


def write_sources(folder: Path, *sources: str) -> None:
    days = {f"day_{day}": {"source": source} for day, source in enumerate(sources)}
    manifest = {"version": MANIFEST_VERSION, "files": {}, "days": days}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_which_days_train(tmp_path, write_days):
    write_days(tmp_path, [4, 3, 5])
    rows = open_splits(tmp_path, "criteo_1t")
    halves = "first half val, second half test."
    assert describe_days(rows) == f"Training: day_0 to day_1. Held out: day_2, {halves}"
    write_sources(tmp_path, "a.gz", "b.gz", "c.gz")
    assert describe_days(rows) == f"Training: day_0 to day_1 (a.gz to b.gz). Held out: day_2 (c.gz), {halves}"
    rows = open_splits(tmp_path, "criteo_1t", needs_training=False)
    assert describe_days({"test": rows["test"]}) == f"Held out: day_2 (c.gz), {halves}"
    write_days(tmp_path / "kaggle", [70], names=["train"])
    rows = open_splits(tmp_path / "kaggle", "criteo_kaggle")
    assert describe_days(rows) == f"Training: the first six sevenths of train. Held out: the last seventh, {halves}"
    assert describe_days({"val": rows["val"]}) == f"Held out: the last seventh of train, {halves}"


@pytest.mark.parametrize("num_rows", [40, 10_000])
def test_a_held_out_day_that_is_a_copy(num_rows, tmp_path, write_days):
    write_days(tmp_path, [num_rows, num_rows, num_rows])
    assert not list(find_copies(open_splits(tmp_path, "criteo_1t")))
    for part in ("dense", "sparse", "labels"):
        (tmp_path / f"day_2_{part}.npy").write_bytes((tmp_path / f"day_1_{part}.npy").read_bytes())
    found = list(find_copies(open_splits(tmp_path, "criteo_1t")))
    assert len(found) == 1
    assert found[0].startswith("WARNING: day_2, which is held out, has the rows of day_1, which trains")


def write_ids(folder: Path, *most: int, rows: int = 600) -> list:
    """Days whose ids are below `most`; gives the shares of folded ones."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for day, limit in enumerate(most):
        np.save(folder / f"day_{day}_dense.npy", draw.normal(size=(rows, 13)).astype(np.float32))
        np.save(folder / f"day_{day}_sparse.npy", draw.integers(0, limit, (rows, 26)))
        np.save(folder / f"day_{day}_labels.npy", draw.integers(0, 2, (rows, 1), np.int32))
    return measure_each_part(open_splits(folder, "criteo_1t"), TABLE_ROWS)


@pytest.mark.parametrize(
    ("most", "words"),
    [
        ((1000, 1000, 2**32), "100% in val, test of the ids lie beyond their tables, and 0% in day_0, day_1."),
        ((1000, 2**32, 1000), "100% in day_1 of the ids lie beyond their tables, and 0% in day_0, val, test."),
        ((2**32, 2**32, 1000), "100% in day_0, day_1 of the ids lie beyond their tables, and 0% in val, test."),
        ((*[1000] * 5, 2**32), "100% in val, test of the ids lie beyond their tables, and 0% in day_0, ..., day_4."),
        ((2**32, 2**32, 2**32), ""),
        ((1000, 900, 1100), ""),
        ((2000, 2000, 2000), ""),
    ],
)
def test_ids_that_are_no_indices(most, words, tmp_path):
    said = compare_folded(write_ids(tmp_path / "days", *most))
    assert words in said
    assert bool(said) == bool(words)
    if said:
        assert said.startswith("WARNING: ids that are not indices. Of cat_0, cat_1, cat_2, cat_3 and 22 more, ")


def test_few_rows_tell_nothing(tmp_path):
    assert compare_folded(write_ids(tmp_path / "days", 1000, 2**32, rows=20)) == ""


def test_one_feature_is_enough(tmp_path):
    write_ids(tmp_path / "days", 1000, 1000)
    sparse = np.load(tmp_path / "days" / "day_1_sparse.npy")
    sparse[:, 7] += 2**30
    np.save(tmp_path / "days" / "day_1_sparse.npy", sparse)
    said = compare_folded(measure_each_part(open_splits(tmp_path / "days", "criteo_1t"), TABLE_ROWS))
    assert "Of cat_7, 100% in val, test of the ids" in said


def test_folding_that_nobody_recorded(tmp_path):
    assert note_unknown_folding(write_ids(tmp_path / "few", 1000, 1000)) == ""
    assert note_unknown_folding(write_ids(tmp_path / "many", 2**32, 2**32)).startswith("Up to 100% of a feature's ids")


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("fault", ["id", "label", "dense"])
def test_held_out_rows_on_disk_are_checked_before_training(fault, stage, tmp_path, write_days):
    write_days(tmp_path, [20, 40])
    name = {"id": "sparse", "label": "labels", "dense": "dense"}[fault]
    array = np.load(tmp_path / f"day_1_{name}.npy")
    array[19 if stage == "val" else 39, 0] = {"id": -7, "label": 2, "dense": np.nan}[fault]
    np.save(tmp_path / f"day_1_{name}.npy", array)
    config = config_of(tmp_path, batch_size=4, mmap_mode=True)
    with pytest.raises(DatasetError, match=f"day_1_{name}.npy: .* at row {19 if stage == 'val' else 39}"):
        build_splits(RunData.open(config), runtime_of(1, 2))
    build_splits(RunData.open(config), runtime_of(0, 2))
