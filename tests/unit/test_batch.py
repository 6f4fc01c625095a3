import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.config.recipes import MLPERF_MULTI_HOT_SIZES
from dlrm.dataset.rows import Rows
from dlrm.loader.batch import Batch, build_batch
from dlrm.loader.partition import Span
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_INTEGER_FEATURES

ONE_HOT = (1,) * 26
HOTNESS = {"one_hot": ONE_HOT, "two_hot": (2,) * 26, "mlperf": MLPERF_MULTI_HOT_SIZES}


def make_rows(num_rows: int, hotness: tuple[int, ...], dtype: type = np.int32) -> Rows:
    rng = np.random.default_rng(num_rows)
    return Rows(
        rng.normal(size=(num_rows, NUM_INTEGER_FEATURES)).astype(np.float32),
        (np.arange(num_rows * sum(hotness), dtype=dtype).reshape(num_rows, sum(hotness)) + 2**24 + 1,),
        rng.integers(0, 2, num_rows).astype(np.int32),
    )


def reference_of(rows: Rows, hotness: tuple[int, ...], padded_rows: int) -> KeyedJaggedTensor:
    """Feature by feature, sample by sample; padding has no ids."""
    values, lengths = [], []
    for feature, size in enumerate(hotness):
        first = sum(hotness[:feature])
        for sample in range(padded_rows):
            ids = rows.ids_BN[sample, first : first + size].tolist() if sample < len(rows.labels_B) else []
            values += ids
            lengths.append(len(ids))
    return KeyedJaggedTensor.from_lengths_sync(
        list(CATEGORICAL_NAMES), torch.tensor(values, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    )


def assert_same(built: KeyedJaggedTensor, reference: KeyedJaggedTensor) -> None:
    assert built.keys() == reference.keys()
    assert (built.stride(), built.stride_per_key()) == (reference.stride(), reference.stride_per_key())
    assert built.length_per_key() == reference.length_per_key()
    assert built.offset_per_key() == reference.offset_per_key()
    for part in ("values", "lengths", "offsets"):
        ours, theirs = getattr(built, part)(), getattr(reference, part)()
        assert ours.dtype == theirs.dtype, part
        assert torch.equal(ours, theirs), part


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("kind", HOTNESS)
def test_parity_with_from_lengths_sync(kind, num_rows, padding):
    hotness = HOTNESS[kind]
    rows = make_rows(num_rows, hotness)
    batch = build_batch(rows, Span(3, 10, 10 + num_rows, num_rows + padding, 99), hotness)
    reference = reference_of(rows, hotness, num_rows + padding)
    assert_same(batch.sparse_features, reference)
    for name in CATEGORICAL_NAMES:
        ours, theirs = batch.sparse_features[name], reference[name]
        assert torch.equal(ours.values(), theirs.values())
        assert torch.equal(ours.lengths(), theirs.lengths())
    for ours, theirs in zip(batch.sparse_features.split([5, 1, 20]), reference.split([5, 1, 20]), strict=True):
        assert_same(ours, theirs)
    assert (batch.span.rows, batch.span.global_rows) == (num_rows, 99)
    np.testing.assert_array_equal(batch.dense_BI[:num_rows], rows.dense_BI)
    np.testing.assert_array_equal(batch.labels_B[:num_rows], rows.labels_B)
    assert batch.dense_BI.shape == (num_rows + padding, NUM_INTEGER_FEATURES)
    assert batch.labels_B.shape == (num_rows + padding,)
    assert batch.dense_BI.dtype == batch.labels_B.dtype == torch.float32
    assert not batch.dense_BI[num_rows:].any()
    assert not batch.labels_B[num_rows:].any()


@pytest.mark.parametrize("kind", HOTNESS)
def test_ids_of_each_feature_apart_give_the_same_batch(kind):
    hotness = HOTNESS[kind]
    rows = make_rows(7, hotness)
    apart = Rows(rows.dense_BI, tuple(np.split(rows.ids[0], np.cumsum(hotness)[:-1], axis=1)), rows.labels_B)
    np.testing.assert_array_equal(apart.ids_BN, rows.ids_BN)
    span = Span(0, 0, 7, 8, 15)
    assert_same(build_batch(apart, span, hotness).sparse_features, build_batch(rows, span, hotness).sparse_features)


@pytest.mark.parametrize("kind", HOTNESS)
def test_a_rank_without_rows(kind):
    rows = make_rows(0, HOTNESS[kind])
    batch = build_batch(rows, Span(0, 5, 5, 1, 3), HOTNESS[kind])
    assert_same(batch.sparse_features, reference_of(rows, HOTNESS[kind], 1))
    assert torch.equal(batch.dense_BI, torch.zeros(1, NUM_INTEGER_FEATURES))
    assert torch.equal(batch.labels_B, torch.zeros(1))
    assert (batch.span.rows, batch.span.global_rows) == (0, 3)


def test_batches_of_one_size_do_not_share_what_differs():
    first, second = make_rows(4, ONE_HOT), make_rows(4, ONE_HOT)
    second.ids[0][:] += 1000
    span = Span(0, 0, 4, 5, 9)
    batches = [build_batch(rows, span, ONE_HOT) for rows in (first, second)]
    for batch, rows in zip(batches, (first, second), strict=True):
        assert_same(batch.sparse_features, reference_of(rows, ONE_HOT, 5))


def test_to_keeps_everything():
    batch = build_batch(make_rows(3, ONE_HOT), Span(0, 0, 3, 4, 7), ONE_HOT)
    moved = batch.to(torch.device("cpu"), non_blocking=True)
    assert isinstance(moved, Batch)
    assert_same(moved.sparse_features, batch.sparse_features)
    assert torch.equal(moved.dense_BI, batch.dense_BI)
    assert torch.equal(moved.labels_B, batch.labels_B)
    assert (moved.span.rows, moved.span.global_rows) == (3, 7)
    meta = batch.to(torch.device("meta"))
    assert {meta.dense_BI.device.type, meta.labels_B.device.type, meta.sparse_features.device().type} == {"meta"}


def test_take():
    rows = make_rows(4, ONE_HOT)
    taken = rows.take(np.array([2, 0, 3, 1]))
    for part in ("dense_BI", "ids_BN", "labels_B"):
        np.testing.assert_array_equal(getattr(taken, part), getattr(rows, part)[[2, 0, 3, 1]])
