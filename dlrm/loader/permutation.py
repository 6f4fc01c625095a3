"""A permutation of any number of rows that needs no memory.

Shapes: B positions.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import numpy as np
import numpy.typing as npt

from dlrm.loader.hashing import random_words
from dlrm.ranks.runtime import derive_seed

_SMALL = 1 << 16
_ROUNDS, _ROUNDS_OF_SMALL = 8, 24


@dataclass(frozen=True)
class Permutation:
    """A pseudo-random permutation of range(size), which depends only on size and seed.

    A Feistel network on Z_a x Z_b, with a and b about the square root of size. The few results that are not below size
    are sent through again until they are (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002:
    generalized Feistel and cycle walking). a is even: if both were odd, every round would be an even permutation, and
    half of all permutations could not occur.
    """

    size: int
    seed: int

    @cached_property
    def _sides(self) -> tuple[int, int]:
        root = isqrt(max(0, self.size - 1)) + 1
        a = root + root % 2
        return a, -(-self.size // a)

    @cached_property
    def _keys(self) -> list[int]:
        rounds = _ROUNDS_OF_SMALL if self.size < _SMALL else _ROUNDS
        return [derive_seed(self.seed, "round", number) for number in range(rounds)]

    def at(self, positions_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The values at some positions of the permutation. Positions are in range(size)."""
        values_B = self._encrypt(positions_B)
        while (outside := np.flatnonzero(values_B >= self.size)).size:
            values_B[outside] = self._encrypt(values_B[outside])
        return values_B

    def _encrypt(self, values_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        a, b = self._sides
        left_B, right_B = np.divmod(values_B, b)
        for number, key in enumerate(self._keys):
            if number % 2:
                _add(right_B, random_words(key, left_B), b)
            else:
                _add(left_B, random_words(key, right_B), a)
        return left_B * b + right_B


def _add(values_B: npt.NDArray[np.int64], words_B: npt.NDArray[np.uint64], modulus: int) -> None:
    """Adds to each value, modulo `modulus`, a number in range(modulus) made from a word. Overwrites the words."""
    words_B >>= np.uint64(32)
    words_B *= np.uint64(modulus)  # no overflow: both are below 2**32
    words_B >>= np.uint64(32)
    words_B += values_B.view(np.uint64)
    # A sum below the modulus stays: sum - modulus wraps round to a huge number, so the minimum is the sum.
    np.minimum(words_B, words_B - np.uint64(modulus), out=values_B.view(np.uint64))
