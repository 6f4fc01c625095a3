import numpy as np
import pytest

from dlrm.dataset.binary_days import open_splits
from dlrm.dataset.rows import Rows
from dlrm.errors import DatasetError
from dlrm.loader import sources as source_module
from dlrm.loader.partition import Partition
from dlrm.loader.permutation import Permutation
from dlrm.loader.random_rows import RandomRows
from dlrm.loader.sources import MappedSource, RandomSource, ShuffledSource, fold_ids, load_rows
from dlrm.ranks.runtime import derive_seed

TABLE_ROWS = np.array([2**31 - 1, 2**24 + 3, 1000, 7, 1] + [50] * 21, dtype=np.int64)


def assert_same(first: Rows, second: Rows) -> None:
    for part in ("dense_BI", "ids_BN", "labels_B"):
        assert getattr(first, part).dtype == getattr(second, part).dtype
        np.testing.assert_array_equal(getattr(first, part), getattr(second, part))


@pytest.mark.parametrize("chunk_rows", [1, 7, 1 << 16])
@pytest.mark.parametrize("sparse_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (3, 2), (2, 3), (1, 5), (50, 2), (20, 4)])
def test_memory_and_mapped_rows_are_the_same(
    batch_size, world_size, sparse_dtype, chunk_rows, tmp_path, write_days, monkeypatch
):
    monkeypatch.setattr(source_module, "_CHUNK_ROWS", chunk_rows)
    written = write_days(tmp_path, [12, 11, 6], sparse_dtype=sparse_dtype)
    rows = open_splits(tmp_path, "criteo_1t")["train"]
    partition = Partition(rows.num_rows, batch_size, world_size)
    mapped = MappedSource(rows, TABLE_ROWS)
    for rank in range(world_size):
        loaded = load_rows(rows, partition, rank, TABLE_ROWS, "")
        assert len(loaded.rows.labels_B) == sum(span.rows for span in partition.spans(rank)) <= -(-23 // world_size)
        for span in partition.spans(rank):
            own = slice(span.start, span.stop)
            ids_BF = written.ids_BN[own].astype(object) % TABLE_ROWS.astype(object)
            expected = Rows(written.dense_BI[own], (ids_BF.astype(np.int32),), written.labels_B[own])
            assert_same(next(loaded.read([span], epoch=0)), expected)
            assert_same(next(loaded.read([span], epoch=3)), expected)
            assert_same(next(mapped.read([span], epoch=2)), expected)


def test_a_limit_loads_only_what_is_used(tmp_path, write_days):
    write_days(tmp_path, [12, 11, 6])
    rows = open_splits(tmp_path, "criteo_1t")["train"]
    assert len(load_rows(rows, Partition(23, 3, 2, limit=2), 1, TABLE_ROWS, "").rows.labels_B) == 6
    assert len(load_rows(rows, Partition(23, 3, 2, drop_last=True), 1, TABLE_ROWS, "").rows.labels_B) == 9


def test_loading_reads_no_rows_of_other_ranks(tmp_path, write_days):
    """Row 4 is wrong: it is rank 1's, and no other rank stumbles over it."""
    write_days(tmp_path, [9, 6])
    labels = np.load(tmp_path / "day_0_labels.npy")
    labels[4] = 7
    np.save(tmp_path / "day_0_labels.npy", labels)
    rows = open_splits(tmp_path, "criteo_1t")["train"]
    partition = Partition(9, 3, 3)
    for rank in (0, 2):
        load_rows(rows, partition, rank, TABLE_ROWS, "")
    with pytest.raises(DatasetError, match="label 7 at row 4"):
        load_rows(rows, partition, 1, TABLE_ROWS, "")


@pytest.mark.parametrize(
    ("ids", "reduced"),
    [
        ([2**31 - 1, 2**24 + 1, 1000, 13, 5] + [49, 50, 51] * 7, [0, 2**24 + 1, 0, 6, 0] + [49, 0, 1] * 7),
        ([5, 5, 1000, 5, 0] + [5] * 21, [5, 5, 0, 5, 0] + [5] * 21),  # one id only, and just outside
    ],
)
def test_ids_are_reduced_modulo_their_tables(ids, reduced):
    ids_BF = np.array([ids], dtype=np.int32)
    rows = fold_ids(Rows(np.zeros((1, 13), np.float32), (ids_BF,), np.zeros(1, np.int32)), TABLE_ROWS)
    assert rows.ids_BN.dtype == np.int32
    assert rows.ids_BN.tolist() == [reduced]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_within_their_tables_stay(dtype):
    """Above 2^24 too, where float32 would round them."""
    ids_BF = np.array([[2**31 - 2, 2**24 + 1, 999, 6, 0] + [49] * 21], dtype=dtype)
    rows = fold_ids(Rows(np.zeros((1, 13), np.float32), (ids_BF,), np.zeros(1, np.int32)), TABLE_ROWS)
    assert rows.ids_BN.dtype == np.int32
    assert rows.ids_BN.tolist() == ids_BF.tolist()


def test_random_epochs_follow_on_each_other():
    random = RandomRows((50,) * 26, (1,) * 26, 0.0, seed=4)
    partition = Partition(12, 3, 2)
    split = RandomSource(random, partition.num_rows)
    for epoch in range(3):
        for rank in range(2):
            spans = list(partition.spans(rank))
            for span, rows in zip(spans, split.read(spans, epoch), strict=True):
                first = 12 * epoch
                assert_same(rows, random.read(first + span.start, first + span.stop))


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_shuffled_rows_are_the_same_however_many_spans_are_read_at_once(batch_size, tmp_path, write_days):
    write_days(tmp_path, [12, 11, 6])
    rows = open_splits(tmp_path, "criteo_1t")["train"]
    shuffled = ShuffledSource(rows, TABLE_ROWS, seed=3)
    spans = [span for rank in range(2) for span in Partition(rows.num_rows, batch_size, 2).spans(rank)]
    assert spans[-1].rows < spans[0].padded_rows
    for span, together in zip(spans, shuffled.read(spans, epoch=1), strict=True):
        assert_same(together, next(shuffled.read([span], epoch=1)))
        numbers_B = Permutation(23, derive_seed(3, "shuffle_training_set", 1)).at(np.arange(span.start, span.stop))
        assert together.dense_BI[:, 0].tolist() == sorted(numbers_B.tolist())
