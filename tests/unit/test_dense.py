"""How the integers enter: statistics, standardized values, buckets."""

import math

import numpy as np
import pytest
import torch

from dlrm.config.config import Config, DataConfig, ModelConfig
from dlrm.loader.dense_statistics import DenseStatistics, sample_rows
from dlrm.loader.run_data import RunData
from dlrm.materialize.command import MaterializeConfig, materialize
from dlrm.model.dense import BucketEmbeddings, StandardizedDense

RNG = np.random.default_rng(3)


def make_dense(rows: int) -> np.ndarray:
    """Three columns: one with missing values, one constant, one of few values; a fourth that is never there."""
    values = np.log(RNG.integers(2, 900, rows)).astype(np.float32)
    first = np.where(RNG.random(rows) < 0.3, np.float32(0), values)
    few = np.log(RNG.choice([2, 3, 50], rows)).astype(np.float32)
    return np.stack([first, np.full(rows, 1.5, np.float32), few, np.zeros(rows, np.float32)], axis=1)


def test_standardized_and_flagged() -> None:
    dense = make_dense(5000)
    got = StandardizedDense(DenseStatistics.of(dense, 4))(torch.from_numpy(dense)).numpy()
    assert got.shape == (5000, 8)
    there = dense[:, 0] != 0
    assert got[there, 0].mean() == pytest.approx(0, abs=1e-4)
    assert got[there, 0].std() == pytest.approx(1, abs=1e-4)
    assert not got[~there, 0].any()
    np.testing.assert_array_equal(got[:, 4], ~there)
    assert not got[:, 1].any()  # a constant: no deviation to divide by
    assert not got[:, 5].any()
    assert not got[:, 3].any()
    assert got[:, 7].all()


@pytest.mark.parametrize("buckets", [1, 2, 8, 32])
def test_buckets_are_quantiles_with_one_for_missing(buckets: int) -> None:
    dense = make_dense(8000)
    statistics = DenseStatistics.of(dense, buckets)
    assert statistics.edges_IE.shape == (4, buckets)
    embeddings = BucketEmbeddings(statistics, 4)
    with torch.no_grad():
        embeddings.weight.copy_(torch.arange(len(embeddings.weight))[:, None].expand(-1, 4))
    got = embeddings(torch.from_numpy(dense)).detach().view(8000, 4, 4)
    assert (got == got[:, :, :1]).all()
    first = np.arange(4) * (buckets + 1)
    number = got[:, :, 0].numpy().astype(int) - first
    assert number.min() >= 0
    assert number.max() <= buckets
    np.testing.assert_array_equal(number == 0, dense == 0)
    plain = [
        [sum(value >= edge for edge in statistics.edges_IE[i]) for i, value in enumerate(row)] for row in dense[:200]
    ]
    np.testing.assert_array_equal(number[:200], plain)
    sizes = np.bincount(number[:, 0], minlength=buckets + 1)[1:]
    assert sizes.max() - sizes.min() < 0.3 * sizes.mean()


def test_values_beyond_the_sample_fall_into_the_first_and_the_last_bucket() -> None:
    statistics = DenseStatistics.of(np.array([[1.0], [2.0], [3.0]], np.float32), 3)
    np.testing.assert_allclose(statistics.edges_IE, [[1e-6, 2, 3]])
    embeddings = BucketEmbeddings(statistics, 4)
    got = embeddings(torch.tensor([[9.0], [0.5], [2.5], [0.0]]))
    torch.testing.assert_close(got, embeddings.weight[[3, 1, 2, 0]])


def test_a_large_set_is_sampled_in_blocks_at_even_distances() -> None:
    asked = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return np.full((stop - start, 2), start, np.float32)

    assert len(sample_rows(1000, read)) == 1000
    assert asked == [(0, 1000)]
    asked.clear()
    sample = sample_rows(10_000_000, read, most=1 << 15)
    assert len(sample) == 1 << 15
    assert asked[0][0] == 0
    assert asked[-1][1] == 10_000_000
    gaps = np.diff([start for start, _ in asked])
    assert gaps.max() - gaps.min() <= 1
    assert math.isclose(sample.mean(), 5_000_000, rel_tol=0.01)


def test_statistics_need_no_ids(tmp_path, write_days):
    """Of multi-hot days, day_{i}_sparse.npy may be gone."""
    write_days(tmp_path / "days", (40, 40))
    sizes, rows = (2, *[1] * 25), (50,) * 26
    materialize(
        MaterializeConfig(
            str(tmp_path / "days"), str(tmp_path / "multi_hot"), multi_hot_sizes=sizes, num_embeddings_per_feature=rows
        )
    )
    for path in (tmp_path / "days").glob("*_sparse.npy"):
        path.unlink()
    config = Config(
        data=DataConfig(
            in_memory_binary_criteo_path=str(tmp_path / "days"),
            synthetic_multi_hot_criteo_path=str(tmp_path / "multi_hot"),
        ),
        model=ModelConfig(num_embeddings_per_feature=rows, standardize_dense=True, dense_buckets=3),
    )
    statistics = RunData.open(config).measure_dense()
    dense = np.load(tmp_path / "days/day_0_dense.npy")
    np.testing.assert_allclose(statistics.mean_I, [column[column != 0].mean() for column in dense.T], atol=1e-5)
