"""A uniform random order of rows that need not fit into memory.

Every row has a random 64-bit key, and the rows are put in the order of their keys. They are first scattered to buckets
by the first bits of their keys, and then each bucket, which fits into memory, is sorted. The order does not depend on
the number of buckets. Shapes: R rows, C words of a record, I integer features, F categorical features.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dlrm.preprocess.kernels import bucket_sizes, gather_rows, scatter_rows, shuffle_keys
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_COLUMNS, NUM_INTEGER_FEATURES
from dlrm.system.files import naming

KEY_BYTES = 8
RECORD_BYTES = 4 * NUM_COLUMNS
GATHER_BYTES_PER_ROW = KEY_BYTES + 8 + 2 * RECORD_BYTES
"""Memory per row for sorting a bucket: key, order, record, and the arrays that are written."""

Keys = npt.NDArray[np.uint64]


class KeySource(Protocol):
    """Gives the keys of rows."""

    def keys(self, first_row: int, rows: int) -> Keys:
        """Keys of rows [first_row, first_row + rows)."""
        ...


@dataclass(frozen=True)
class RandomKeys:
    """Independent random keys, the same for the same seed."""

    seed: int

    def keys(self, first_row: int, rows: int) -> Keys:
        """Keys of rows [first_row, first_row + rows)."""
        keys_R = np.empty(rows, np.uint64)
        shuffle_keys(np.uint64(self.seed), first_row, keys_R)
        return keys_R


@dataclass(frozen=True)
class KeysInOrder:
    """Keys that leave the rows where they are."""

    num_rows: int

    def keys(self, first_row: int, rows: int) -> Keys:
        """Keys of rows [first_row, first_row + rows)."""
        return np.arange(first_row, first_row + rows, dtype=np.uint64) * _step(self.num_rows)


@dataclass(frozen=True)
class GivenKeys:
    """Keys that put each row at a given place."""

    positions: npt.NDArray[Any]
    """Place of each row, a permutation."""

    def keys(self, first_row: int, rows: int) -> Keys:
        """Keys of rows [first_row, first_row + rows)."""
        return self.positions[first_row : first_row + rows].astype(np.uint64) * _step(len(self.positions))


def _step(num_rows: int) -> np.uint64:
    """The distance between the keys of consecutive places. Keys then fill their range evenly."""
    return np.uint64(2**64 // num_rows if num_rows > 1 else 1)


@dataclass(frozen=True)
class ArrayFiles:
    """The three arrays of a day under construction."""

    folder: Path
    name: str
    rows: int
    ids_dtype: np.dtype[Any] = np.dtype("<i4")  # noqa: RUF009 - a dtype is immutable

    def _parts(self) -> tuple[tuple[Path, np.dtype[Any], int], ...]:
        return (
            (self.folder / f"{self.name}_dense.npy", np.dtype("<f4"), NUM_INTEGER_FEATURES),
            (self.folder / f"{self.name}_sparse.npy", self.ids_dtype, NUM_CATEGORICAL_FEATURES),
            (self.folder / f"{self.name}_labels.npy", np.dtype("<i4"), 1),
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files of dense values, indices and labels."""
        return tuple(path for path, _, _ in self._parts())

    def create(self) -> None:
        """Creates the files with headers, in their full size."""
        for path, dtype, columns in self._parts():
            with naming(path), path.open("r+b" if path.exists() else "w+b") as file:
                header = {"descr": dtype.str, "fortran_order": False, "shape": (self.rows, columns)}
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + self.rows * columns * dtype.itemsize)

    def write(self, first_row: int, dense_RI: npt.NDArray[Any], indices_RF: npt.NDArray[Any], labels_R: Any) -> None:
        """Writes rows from `first_row` on."""
        for (path, dtype, columns), array in zip(self._parts(), (dense_RI, indices_RF, labels_R), strict=True):
            size = self.rows * columns * dtype.itemsize
            data = np.ascontiguousarray(array, dtype if dtype.kind == "i" else None)
            offset = path.stat().st_size - size + first_row * columns * dtype.itemsize
            write_at(path, offset, data)


def write_at(path: Path, offset: int, data: npt.NDArray[Any]) -> None:
    """Writes an array's bytes into a file, which is created if it is missing."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        with naming(path):
            while view:
                count = os.pwrite(handle, view, offset)
                offset, view = offset + count, view[count:]
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Buckets:
    """Scattered rows, with a file for each bucket: first keys, then records, both in the order of row numbers.

    Attributes:
        sizes: rows of each bucket.
    """

    folder: Path
    sizes: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """For each bucket the number of rows in the buckets before it; at the end the number of all rows."""
        return tuple(np.cumsum([0, *self.sizes]).tolist())

    def path(self, bucket: int) -> Path:
        """File of a bucket."""
        return self.folder / f"{bucket:06d}"

    def scatter(
        self,
        keys_R: Keys,
        places: npt.NDArray[np.int64],
        dense_IR: npt.NDArray[np.float32],
        indices_FR: npt.NDArray[np.int32],
        labels_R: npt.NDArray[np.uint8],
    ) -> None:
        """Writes rows to their buckets.

        Args:
            places: for each bucket the number of earlier rows, behind which these rows go.
        """
        rows = len(keys_R)
        counts = np.zeros(len(self.sizes), np.int64)
        bucket_sizes(keys_R, counts)
        firsts = np.cumsum(counts) - counts
        sorted_keys_R, records_RC = np.empty(rows, np.uint64), np.empty((rows, NUM_COLUMNS), np.int32)
        scatter_rows(keys_R, firsts.copy(), dense_IR.view(np.int32), indices_FR, labels_R, sorted_keys_R, records_RC)
        for bucket in np.flatnonzero(counts).tolist():
            here = slice(firsts[bucket], firsts[bucket] + counts[bucket])
            path, place = self.path(bucket), int(places[bucket])
            write_at(path, KEY_BYTES * place, sorted_keys_R[here])
            write_at(path, KEY_BYTES * self.sizes[bucket] + RECORD_BYTES * place, records_RC[here])

    def gather(self, bucket: int, days: Sequence[ArrayFiles]) -> list[ArrayFiles]:
        """Writes a bucket's rows to the days, in the order of their keys; returns the days that got any."""
        rows = self.sizes[bucket]
        if rows == 0:
            return []
        keys_R = np.fromfile(self.path(bucket), np.uint64, rows)
        records_RC = np.fromfile(self.path(bucket), np.int32, rows * NUM_COLUMNS, offset=KEY_BYTES * rows)
        order_R = np.argsort(keys_R, kind="stable")  # if two keys are equal, the earlier row comes first
        dense_RI = np.empty((rows, NUM_INTEGER_FEATURES), np.int32)
        indices_RF = np.empty((rows, NUM_CATEGORICAL_FEATURES), np.int32)
        labels_R = np.empty(rows, np.int32)
        gather_rows(order_R, records_RC.reshape(rows, NUM_COLUMNS), dense_RI, indices_RF, labels_R)
        return write_rows(days, self.starts[bucket], dense_RI.view(np.float32), indices_RF, labels_R)


def write_rows(
    days: Sequence[ArrayFiles],
    first_row: int,
    dense_RI: npt.NDArray[np.float32],
    indices_RF: npt.NDArray[np.int32],
    labels_R: npt.NDArray[Any],
) -> list[ArrayFiles]:
    """Writes rows to the days that they belong to; returns those days.

    Args:
        first_row: number of the first row, counted over all days.
    """
    touched = []
    day_start = 0
    for day in days:
        low, high = max(first_row, day_start), min(first_row + len(labels_R), day_start + day.rows)
        if low < high:
            here = slice(low - first_row, high - first_row)
            day.write(low - day_start, dense_RI[here], indices_RF[here], labels_R[here])
            touched.append(day)
        day_start += day.rows
    return touched


def count_buckets(keys: KeySource, num_rows: int, num_buckets: int, chunk_rows: int = 1 << 20) -> tuple[int, ...]:
    """Rows that fall into each bucket."""
    sizes = np.zeros(num_buckets, np.int64)
    for first in range(0, num_rows, chunk_rows):
        bucket_sizes(keys.keys(first, min(chunk_rows, num_rows - first)), sizes)
    return tuple(sizes.tolist())
