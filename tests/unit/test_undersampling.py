import math

import numpy as np
import pytest

from dlrm.dataset.binary_days import DayRows, open_splits
from dlrm.errors import DatasetError
from dlrm.loader import undersampling as undersampling_module
from dlrm.loader.undersampling import undersample


def open_rows(folder, write_days, rows_per_day, click_rate=0.1) -> DayRows:
    write_days(folder, rows_per_day)
    rng = np.random.default_rng(5)
    for day, count in enumerate(rows_per_day):
        np.save(folder / f"day_{day}_labels.npy", (rng.random((count, 1)) < click_rate).astype(np.int32))
    return open_splits(folder, "criteo_1t")["train"]


@pytest.mark.parametrize("piece_rows", [512, 1 << 18])
@pytest.mark.parametrize("rows_per_day", [(1, 1, 2), (7, 505, 2), (512, 2), (1024, 1, 2), (3000, 2600, 2)])
def test_all_positives_stay_and_rows_are_found_by_their_new_numbers(
    rows_per_day, piece_rows, tmp_path, write_days, monkeypatch
):
    monkeypatch.setattr(undersampling_module, "_PIECE_ROWS", piece_rows)
    rows = open_rows(tmp_path, write_days, rows_per_day)
    kept = undersample(rows, 0.6, 4, "")
    numbers = kept.find(np.arange(kept.num_rows))
    assert (np.diff(numbers) > 0).all()
    labels = rows.read_labels(0, rows.num_rows)
    assert set(np.flatnonzero(labels)) <= set(numbers.tolist())
    if rows.num_rows > 500:
        share = (labels[numbers] == 0).sum() / (labels == 0).sum()
        assert abs(share - 0.6) < 5 * math.sqrt(0.24 / (labels == 0).sum())
    for start, stop in ((0, kept.num_rows), (kept.num_rows // 3, kept.num_rows // 2), (1, 1)):
        read = kept.read(start, stop)
        assert read.dense_BI[:, 0].astype(int).tolist() == numbers[start:stop].tolist()
        np.testing.assert_array_equal(read.labels_B, labels[numbers[start:stop]])


def test_which_rows_stay_is_a_function_of_seed_and_row(tmp_path, write_days):
    rows = open_rows(tmp_path / "long", write_days, (4000, 2))
    kept = {seed: undersample(rows, 0.3, seed, "").find for seed in (1, 2)}
    first, other = (set(find(np.arange(300)).tolist()) for find in kept.values())
    assert first != other
    again = undersample(rows, 0.3, 1, "")
    assert set(again.find(np.arange(300)).tolist()) == first
    # A larger share keeps what a smaller one kept.
    more = undersample(rows, 0.5, 1, "")
    assert first < set(more.find(np.arange(more.num_rows)).tolist())


def test_rates_at_the_ends(tmp_path, write_days):
    rows = open_rows(tmp_path / "a", write_days, (1000, 2))
    assert undersample(rows, 1.0, 1, "").num_rows == 1000
    labels = rows.read_labels(0, 1000)
    assert undersample(rows, 1e-12, 1, "").num_rows == labels.sum()
    without = open_rows(tmp_path / "b", write_days, (1000, 2), click_rate=0)
    with pytest.raises(DatasetError, match="--undersampling_rate 1e-12: none of 1,000 training rows is left"):
        undersample(without, 1e-12, 1, "")


def test_a_bad_label_is_found_while_labels_are_scanned(tmp_path, write_days):
    write_days(tmp_path, (10, 20, 4))
    labels = np.load(tmp_path / "day_1_labels.npy")
    labels[13] = 2
    np.save(tmp_path / "day_1_labels.npy", labels)
    with pytest.raises(DatasetError, match=r"day_1_labels.npy: label 2 at row 13"):
        undersample(open_splits(tmp_path, "criteo_1t")["train"], 0.5, 0, "")


def test_progress_is_shown(tmp_path, write_days, capsys, monkeypatch):
    monkeypatch.setattr("dlrm.system.console._SECONDS_BETWEEN_LINES", 0.0)
    undersample(open_rows(tmp_path, write_days, (100, 2)), 0.5, 0, "Undersampling")
    assert "Undersampling: 100/100 labels" in capsys.readouterr().out


def test_a_row_takes_little_more_than_a_bit(tmp_path, write_days):
    kept = undersample(open_rows(tmp_path, write_days, (100_000, 2)), 0.5, 0, "")
    held = kept.bits_KW.nbytes + kept.starts_K.nbytes
    assert held * 8 / 100_000 == pytest.approx(undersampling_module.BITS_PER_ROW, rel=0.01)
    assert undersampling_module.BITS_PER_ROW < 1.2
