"""Leaves out some negatives of a training set. Which rows are kept takes one bit a row.

Shapes: B rows of a batch, R rows of a piece, K blocks of W bytes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.dataset.binary_days import DayRows
from dlrm.dataset.rows import Rows
from dlrm.errors import DatasetError
from dlrm.loader.hashing import random_words
from dlrm.system.console import Progress

_BLOCK_BYTES = 64
_BLOCK_ROWS = 8 * _BLOCK_BYTES
_PIECE_ROWS = 1 << 18
_FRACTION_BITS = 53
BITS_PER_ROW = 1 + 64 / _BLOCK_ROWS
"""Memory of a row: its bit, and its share of the counts by which the k-th kept row is found."""
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_ONES = _BITS.sum(axis=1, dtype=np.uint8)
# _PLACES[byte, k]: place of the k-th set bit of a byte.
_PLACES = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.uint8)


@dataclass(frozen=True)
class KeptRows:
    """The rows of a split that were kept, in order, numbered from 0.

    Attributes:
        num_rows: rows that were kept.
        bits_KW: K blocks of bits, one for each row of the split, lowest bit first; 1 if the row was kept.
        starts_K: kept rows before each block.
    """

    rows: DayRows
    num_rows: int
    bits_KW: npt.NDArray[np.uint8]
    starts_K: npt.NDArray[np.int64]

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each array of ids."""
        return self.rows.widths

    def read(self, start: int, stop: int) -> Rows:
        """Copies kept rows [start, stop), checked as `DayRows.read` does."""
        return self.take(np.arange(start, stop))

    def take(self, rows_B: npt.NDArray[np.int64]) -> Rows:
        """Copies kept rows, given in ascending order, checked as `DayRows.read` does."""
        return self.rows.take(self.find(rows_B))

    def find(self, kept_B: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of kept rows in the split.

        The block is found by binary search in `starts_K`; within it the 64-bit word, the byte and the bit, by counts of
        set bits.
        """
        block_B = np.searchsorted(self.starts_K, kept_B, side="right") - 1
        left_B = kept_B - self.starts_K[block_B]
        words_BW = self.bits_KW.view(np.uint64)[block_B]
        word_B, word_number_B, left_B = _descend(words_BW, np.bitwise_count(words_BW), left_B)
        bytes_BW = word_B.view(np.uint8).reshape(-1, 8)
        byte_B, byte_number_B, left_B = _descend(bytes_BW, _ONES[bytes_BW], left_B)
        return block_B * _BLOCK_ROWS + word_number_B * 64 + byte_number_B * 8 + _PLACES[byte_B, left_B]


def _descend(
    units_BW: npt.NDArray[Any], ones_BW: npt.NDArray[np.uint8], left_B: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each row, the unit (word or byte) that holds its k-th set bit: the unit, its index, and k within it.

    Args:
        ones_BW: set bits of each unit.
        left_B: k of each row.
    """
    ends_BW = ones_BW.cumsum(axis=1, dtype=np.int64)
    number_B = (ends_BW <= left_B[:, None]).sum(axis=1)
    every_B = np.arange(len(left_B))
    return units_BW[every_B, number_B], number_B, left_B - ends_BW[every_B, number_B] + ones_BW[every_B, number_B]


def undersample(rows: DayRows, rate: float, seed: int, label: str) -> KeptRows:
    """Keeps all rows with label 1, and those with label 0 whose random number in [0, 1) is below `rate`.

    The random number depends only on the seed and the row's number. Reads all labels once.

    Args:
        label: of the progress bar; empty for no bar.

    Raises:
        DatasetError: at a label other than 0 and 1, or if no row is left.
    """
    threshold = np.uint64(round(rate * 2**_FRACTION_BITS))
    bits_KW = np.zeros((-(-rows.num_rows // _BLOCK_ROWS), _BLOCK_BYTES), np.uint8)
    bits = bits_KW.reshape(-1)
    counts_K = np.zeros(len(bits_KW), np.int64)
    progress = Progress(label, rows.num_rows, "labels", shown=bool(label))
    for start in range(0, rows.num_rows, _PIECE_ROWS):
        stop = min(start + _PIECE_ROWS, rows.num_rows)
        words_R = random_words(seed, np.arange(start, stop)) >> np.uint64(64 - _FRACTION_BITS)
        kept_R = (rows.read_labels(start, stop) == 1) | (words_R < threshold)
        packed = np.packbits(kept_R, bitorder="little")
        bits[start // 8 : start // 8 + len(packed)] = packed
        blocks = slice(start // _BLOCK_ROWS, -(-stop // _BLOCK_ROWS))
        counts_K[blocks] = _ONES[bits_KW[blocks]].sum(axis=1, dtype=np.int64)
        progress.advance(stop - start)
    progress.close()
    num_kept = int(counts_K.sum())
    if num_kept == 0:
        raise DatasetError(
            f"--undersampling_rate {rate:g}: none of {rows.num_rows:,} training rows is left. Give a larger one."
        )
    return KeptRows(rows, num_kept, bits_KW, counts_K.cumsum() - counts_K)
