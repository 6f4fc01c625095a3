"""A permutation of any number of rows that takes no memory.

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
    """A keyed pseudo-random permutation of range(size), a function of size and seed alone.

    A Feistel network on Z_a x Z_b, a and b about the square root of size, whose few values beyond size are sent through
    again until they fall inside (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002: generalized
    Feistel and cycle walking). a is even: were both odd, every round would be an even permutation.
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
        """What stands at these positions of the permutation; positions are in range(size)."""
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
    """Adds a number in range(modulus), taken from each word, modulo that."""
    words_B >>= np.uint64(32)
    words_B *= np.uint64(modulus)  # both below 2**32
    words_B >>= np.uint64(32)
    words_B += values_B.view(np.uint64)
    # Below the modulus the difference wraps round to a huge number, so that the sum itself is the smaller one.
    np.minimum(words_B, words_B - np.uint64(modulus), out=values_B.view(np.uint64))
