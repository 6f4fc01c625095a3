import itertools
import math
from collections import Counter

import numpy as np
import pytest

from dlrm.config.recipes import CRITEO_1T_TRAINING_ROWS
from dlrm.loader.permutation import Permutation


def whole(size: int, seed: int) -> np.ndarray:
    return Permutation(size, seed).at(np.arange(size))


def z_score(counts: np.ndarray, expected: float, freedom: int) -> float:
    """How many standard deviations a chi-square statistic lies above its mean."""
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [*range(1, 130), 255, 256, 257, 4095, 4096, 4097, 65_535, 65_536, 65_537, 1_000_003])
def test_every_number_comes_once(size):
    np.testing.assert_array_equal(np.sort(whole(size, 3)), np.arange(size))


def test_a_position_does_not_depend_on_what_else_is_asked_for():
    values = whole(70_000, 5)
    permutation = Permutation(70_000, 5)
    for positions in (np.array([69_999]), np.arange(10, 20), np.array([7, 3, 50_000, 3]), np.empty(0, np.int64)):
        np.testing.assert_array_equal(permutation.at(positions), values[positions])


@pytest.mark.parametrize("size", [1000, 100_000])
def test_seeds_give_unrelated_permutations(size):
    first = whole(size, 0)
    np.testing.assert_array_equal(first, whole(size, 0))
    for other in (whole(size, 1), np.arange(size)):
        assert (first == other).sum() < 10  # one is expected
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / math.sqrt(size)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_a_few_come_alike_often(size):
    every = list(itertools.permutations(range(size)))
    counts = Counter(tuple(whole(size, seed).tolist()) for seed in range(1200))
    assert abs(z_score(np.array([counts[each] for each in every]), 1200 / len(every), len(every) - 1)) < 4


@pytest.mark.parametrize("size", [9, 37])
def test_pairs_of_positions_hold_all_pairs_of_values_alike_often(size):
    seeds = 40 * size
    drawn = np.array([whole(size, seed) for seed in range(seeds)])
    for first, second in ((0, 1), (0, size - 1), (size // 2, 3)):
        counts = np.zeros((size, size))
        np.add.at(counts, (drawn[:, first], drawn[:, second]), 1)
        pairs = counts[~np.eye(size, dtype=bool)]
        assert abs(z_score(pairs, seeds / len(pairs), len(pairs) - 1)) < 4


@pytest.mark.parametrize("size", [10**6, 2**20 + 1, CRITEO_1T_TRAINING_ROWS])
def test_values_spread_evenly_wherever_a_batch_lies(size):
    """Values of 200,000 neighbouring positions: their places, their distances, and what the next one is to them."""
    permutation = Permutation(size, 11)
    for start in (0, size // 3, size - 200_000):
        values = permutation.at(np.arange(start, start + 200_000))
        assert len(np.unique(values)) == 200_000
        bins = values * 1000 // size
        without_return = 1 - 200_000 / size  # drawn without return, counts vary less
        counts = np.bincount(bins, minlength=1000)
        assert abs(z_score(counts, 200, 999) + math.sqrt(999 / 2) * (1 - without_return)) < 5
        distances = (np.diff(values) % size) * 100 // size
        assert abs(z_score(np.bincount(distances, minlength=100), 1999.99, 99)) < 5
        neighbours = (values[:-1] * 20 // size) * 20 + values[1:] * 20 // size
        assert abs(z_score(np.bincount(neighbours, minlength=400), 199_999 / 400, 399)) < 6
