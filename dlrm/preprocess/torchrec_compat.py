"""What torchrec's public functions do to ids and rows differently from us."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.preprocess.vocabulary import FIRST_INDEX
from dlrm.system.files import naming


def round_to_float32(indices: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Indices after torchrec's shuffle, which holds them in float32: above 2**24 they are rounded."""
    return indices.astype(np.float32).astype(np.int32)


def rounded_rows(rows: int) -> int:
    """Rows that a table needs once its largest index, rows - 1, may have been rounded up."""
    return int(np.float32(rows - 1)) + 1


def merged_ids(kept: int) -> int:
    """How many of the indices below 2 + `kept` become equal to another one when rounded to float32."""
    largest = FIRST_INDEX + kept - 1
    if largest <= 2**24:
        return 0
    top = int(np.float32(largest))
    distinct, low = 2**24, 2**24  # 0 to 2**24 - 1 are exact
    while low <= top:
        step = low >> 23
        distinct += (min(top, 2 * low - step) - low) // step + 1
        low *= 2
    return largest + 1 - distinct


def numpy_shuffle_positions(rows: int, seed: int, folder: Path, memory_bytes: int) -> npt.NDArray[Any]:
    """The place of each row after np.random.seed(seed), np.random.shuffle(array of `rows` rows).

    Two arrays of 8 bytes a row are needed. If they are larger than `memory_bytes`, they are mapped files in `folder`.
    That is slow, since numpy's shuffle visits places at random.
    """
    shape, dtype = (rows,), np.dtype(np.int64)
    if 16 * rows <= memory_bytes or rows == 0:
        order, positions = np.arange(rows), np.empty(shape, dtype)
    else:
        order, positions = (_mapped(folder / name, dtype, rows) for name in ("order", "positions"))
        order[:] = np.arange(rows)
    np.random.RandomState(seed).shuffle(order)
    positions[order] = np.arange(rows)
    return positions


def _mapped(path: Path, dtype: np.dtype[Any], rows: int) -> npt.NDArray[Any]:
    """An array in a new file. Disk space is reserved first: a write to a mapped file on a full disk means SIGBUS."""
    with naming(path), path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, dtype.itemsize * rows)
    return np.memmap(path, dtype, "r+", shape=(rows,)).view(np.ndarray)
