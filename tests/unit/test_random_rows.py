import dataclasses
import itertools

import numpy as np
import pytest

from dlrm.loader.random_rows import RandomRows, draw_ids
from dlrm.schema.criteo import NUM_INTEGER_FEATURES

ROWS, HOTNESS = (2, 1000, 3, 50), (3, 1, 2, 4)
SOURCE = RandomRows(ROWS, HOTNESS, 1.2, seed=11)


def as_one(source: RandomRows, *ranges: tuple[int, int]) -> np.ndarray:
    """Rows of the ranges, all columns side by side."""
    parts = [source.read(start, stop) for start, stop in ranges]
    return np.concatenate([np.column_stack([part.dense_BI, part.ids_BN, part.labels_B]) for part in parts])


def test_types_and_shapes():
    rows = SOURCE.read(5, 12)
    assert (rows.dense_BI.shape, rows.dense_BI.dtype) == ((7, NUM_INTEGER_FEATURES), np.float32)
    assert (rows.ids_BN.shape, rows.ids_BN.dtype) == ((7, sum(HOTNESS)), np.int32)
    assert (rows.labels_B.shape, rows.labels_B.dtype) == ((7,), np.int32)


@pytest.mark.parametrize("cuts", [(0, 60), (0, 1, 2, 59, 60), (0, 29, 31, 60), tuple(range(61))])
def test_a_row_does_not_depend_on_how_it_is_read(cuts):
    source = SOURCE
    np.testing.assert_array_equal(
        as_one(source, *itertools.pairwise(cuts)), as_one(source, *((i, i + 1) for i in range(60)))
    )


def test_rows_far_out_are_read_alike():
    far = 2**40
    np.testing.assert_array_equal(as_one(SOURCE, (far, far + 9)), as_one(SOURCE, (far, far + 4), (far + 4, far + 9)))


def test_fresh_rows_do_not_repeat():
    assert len(np.unique(SOURCE.read(0, 5000).dense_BI, axis=0)) == 5000


def test_seeds_differ():
    first, second = SOURCE.read(0, 500), dataclasses.replace(SOURCE, seed=12).read(0, 500)
    assert (first.dense_BI != second.dense_BI).mean() > 0.99
    assert len(np.unique(np.concatenate([first.dense_BI, second.dense_BI]), axis=0)) == 1000


@pytest.mark.parametrize("start", [0, 7, 30, 60])
def test_no_rows(start):
    rows = SOURCE.read(start, start)
    assert rows.dense_BI.shape == (0, NUM_INTEGER_FEATURES)
    assert rows.ids_BN.shape == (0, sum(HOTNESS))
    assert rows.labels_B.shape == (0,)


def test_every_other_row_is_a_click_whatever_its_features():
    rows = SOURCE.read(3, 20_003)
    np.testing.assert_array_equal(rows.labels_B, [1, 0] * 10_000)
    # The standard error of each difference of means is sqrt(1/12 * 4/20000) = 0.0041.
    difference_I = rows.dense_BI[rows.labels_B == 1].mean(0) - rows.dense_BI[rows.labels_B == 0].mean(0)
    assert np.abs(difference_I).max() < 5 * 0.0041


def test_integers_are_uniform():
    dense_BI = SOURCE.read(0, 20_000).dense_BI
    assert dense_BI.min() >= 0
    assert dense_BI.max() < 1
    counts = np.stack([np.histogram(column, bins=10, range=(0, 1))[0] for column in dense_BI.T])
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(20_000 * 0.1 * 0.9)


def probabilities(rows: int, exponent: float) -> np.ndarray:
    """The documented law, integrated numerically."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    x = np.arange(1, rows + 1)[:, None] + (nodes + 1) / 2
    masses = (x**-exponent * weights).sum(1)
    return masses / masses.sum()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.2])
def test_ids_follow_the_documented_law(exponent):
    num_rows = 40_000
    ids_BN = dataclasses.replace(SOURCE, zipf_exponent=exponent).read(0, num_rows).ids_BN
    blocks = np.split(ids_BN, np.cumsum(HOTNESS)[:-1], axis=1)
    for rows, block in zip(ROWS, blocks, strict=True):
        law = probabilities(rows, exponent)
        for column in block.T:
            counts = np.bincount(column, minlength=rows)
            assert len(counts) == rows
            # 5 standard deviations; the half is for ids that are expected less than once
            assert (np.abs(counts - num_rows * law) <= 5 * np.sqrt(num_rows * law * (1 - law)) + 0.5).all()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.999, 1.0, 1.2, 3.0])
def test_an_even_grid_gives_each_id_its_share(exponent):
    """Without chance: of 200,000 evenly spaced numbers, each id gets its probability's share, to within one."""
    num_draws, rows = 200_000, 300
    grid_BN = ((np.arange(num_draws) + 0.5) / num_draws)[:, None]
    counts = np.bincount(draw_ids(grid_BN, np.array([float(rows)]), exponent)[:, 0], minlength=rows)
    assert np.abs(counts - num_draws * probabilities(rows, exponent)).max() <= 1


def test_columns_of_a_multi_hot_feature_lie_together_and_differ():
    source = RandomRows((1, 10_000, 1, 10_000), HOTNESS, 0.0, seed=3)
    rows = source.read(0, 4000)
    ids_BN = rows.ids_BN
    feature_N = np.repeat(range(4), HOTNESS)
    assert (ids_BN[:, np.isin(feature_N, (0, 2))] == 0).all()
    wide_BN = ids_BN[:, np.isin(feature_N, (1, 3))]
    assert all(len(np.unique(column)) > 3000 for column in wide_BN.T)
    # Neither with each other nor with the integers: 5 standard errors of a correlation over 4,000 rows
    correlations = np.corrcoef(np.concatenate([wide_BN, rows.dense_BI], axis=1).T)
    assert np.abs(correlations - np.eye(len(correlations))).max() < 5 / np.sqrt(4000)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.2, 9.99])
def test_ids_stay_within_their_tables(exponent):
    rows_N = np.array([1, 2, 3, 10_000_019, 2**31 - 1], dtype=np.float64)
    for uniform in (0.0, 0.5, 1 - 2.0**-53):
        ids_BN = draw_ids(np.full((1, len(rows_N)), uniform), rows_N, exponent)
        assert ids_BN.dtype == np.int32
        assert (ids_BN >= 0).all()
        assert (ids_BN < rows_N).all()
    assert (draw_ids(np.zeros((1, len(rows_N))), rows_N, exponent) == 0).all()


def test_large_tables_are_used_to_their_last_row():
    rows = 2**31 - 1
    ids = RandomRows((rows,), (1,), 0.0, seed=0).read(0, 10_000).ids_BN
    assert ids.min() < rows / 1000
    assert ids.max() > rows * 0.999
    assert (ids % 2).sum() == pytest.approx(5000, abs=250)
