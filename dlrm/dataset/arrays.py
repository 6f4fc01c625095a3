"""The arrays of a day: their types, and checks of their values.

Shapes: R rows of a chunk, F categorical features.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dlrm.errors import DatasetError
from dlrm.schema.criteo import NO_LABEL, NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES
from dlrm.system.console import Progress
from dlrm.system.files import read_npy_header

_CHUNK_BYTES = 4 << 20
PARTS = {"dense": NUM_INTEGER_FEATURES, "sparse": NUM_CATEGORICAL_FEATURES, "labels": 1}
"""The arrays of a day, and the number of columns of each."""
DTYPES = {
    "dense": (np.dtype("<f4"),),
    "sparse": (np.dtype("<i4"), np.dtype("<i8")),
    "labels": (np.dtype("<i4"),),
}
"""The types that an array may have. `dlrm preprocess` writes the first one."""
ARRAY = rf"({'|'.join(PARTS)})\.npy"
"""Regular expression for an array's file name, after the day's name and a `_` (see `dlrm.dataset.days.day_of`)."""


def rows_of(name: str, rows: Mapping[str, int]) -> int | None:
    """Rows of an array file, from the rows of each day; None for a file of another kind."""
    return next((rows[day] for day in rows for part in PARTS if name == f"{day}_{part}.npy"), None)


def measure_file(
    path: Path,
    rows: int | None,
    table_rows: Sequence[int] | None,
    progress: Progress | None = None,
    has_labels: bool = True,
    digests: Sequence[str] = ("sha256",),
) -> dict[str, Any]:
    """Reads a file once: its size, its checksums and, if it is an array of a day, checks of its values.

    Args:
        rows: rows of the day; None for a file that is not an array.
        table_rows: ids of column c must be below table_rows[c]; None if there is no such bound.
        has_labels: whether labels are 0 and 1; otherwise all must be -1.
        digests: algorithms of hashlib.

    Returns:
        `bytes`, a hexadecimal digest under the name of each algorithm; `positives` of labels; `largest` of ids without
        a bound: the largest id of each feature.

    Raises:
        DatasetError: if the header does not fit, or a value is out of range.
    """
    facts: dict[str, Any] = {"bytes": path.stat().st_size}
    sums = {algorithm: hashlib.new(algorithm, usedforsecurity=False) for algorithm in digests}
    with path.open("rb") as file:
        checker = None
        if rows is not None:
            part = path.stem.rsplit("_", 1)[1]
            dtype = _read_header(path, file, part, rows)
            header = file.tell()
            file.seek(0)
            for one in sums.values():
                one.update(file.read(header))
                file.seek(0)
            file.seek(header)
            checker = _ArrayChecker(path, part, dtype, table_rows, has_labels)
        width = checker.row_bytes if checker else 1
        while chunk := file.read(_CHUNK_BYTES // width * width):
            for one in sums.values():
                one.update(chunk)
            if checker:
                checker.add(chunk)
            if progress:
                progress.advance(len(chunk))
    if checker and checker.part == "labels" and has_labels:
        facts["positives"] = checker.positives
    if checker and checker.part == "sparse" and table_rows is None:
        facts["largest"] = checker.largest_F
    return {**facts, **{algorithm: one.hexdigest() for algorithm, one in sums.items()}}


def _read_header(path: Path, file: BinaryIO, part: str, rows: int) -> np.dtype[Any]:
    try:
        shape, fortran_order, dtype = read_npy_header(file)
    except ValueError as error:
        raise DatasetError(f"{path}: not a readable .npy file ({error}). Copy or write the folder again.") from None
    expected = (rows, PARTS[part])
    if shape != expected or fortran_order or dtype not in DTYPES[part]:
        raise DatasetError(
            f"{path}: {dtype!s:.40} {list(shape)}, expected {DTYPES[part][0]} {list(expected)}. Copy or write the "
            "folder again."
        )
    size = file.tell() + rows * PARTS[part] * dtype.itemsize
    if path.stat().st_size != size:
        raise DatasetError(
            f"{path}: {path.stat().st_size:,} bytes, expected {size:,} by its header. Copy or write the folder again."
        )
    return dtype


class _ArrayChecker:
    """Checks the values of one array, a chunk of whole rows at a time."""

    def __init__(
        self, path: Path, part: str, dtype: np.dtype[Any], table_rows: Iterable[int] | None, has_labels: bool
    ) -> None:
        self.path, self.part, self.positives = path, part, 0
        self._has_labels = has_labels
        self.largest_F = np.full(PARTS[part], -1, np.int64)
        self.row_bytes = PARTS[part] * dtype.itemsize
        self._dtype = dtype
        self._limits = None if table_rows is None else np.array(list(table_rows))
        self._row = 0

    def add(self, chunk: bytes) -> None:
        """Checks the next rows, given as their bytes."""
        values = np.frombuffer(chunk, self._dtype).reshape(-1, PARTS[self.part])
        bad, expected = self._find_bad(values)
        if bad is not None:
            row, column = np.argwhere(bad)[0]
            raise DatasetError(
                f"{self.path}: {values[row, column]} at row {self._row + row}, column {column}, expected {expected}. "
                "Preprocess the logs again."
            )
        self._row += len(values)

    def _find_bad(self, values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.bool_] | None, str]:
        """A mask of the values that are out of range, None if none is, and what was expected."""
        if self.part == "dense":
            return None if np.isfinite(values).all() else ~np.isfinite(values), "a finite number"
        if self.part == "labels" and not self._has_labels:
            return (values != NO_LABEL) if (values != NO_LABEL).any() else None, f"{NO_LABEL} in rows without labels"
        if self.part == "labels":
            self.positives += int(values.sum())
            return (values < 0) | (values > 1) if values.min() < 0 or values.max() > 1 else None, "0 or 1"
        limits = np.full(values.shape[1], np.iinfo(values.dtype).max) if self._limits is None else self._limits
        self.largest_F = np.maximum(self.largest_F, values.max(axis=0))
        if values.min() >= 0 and (values.max(axis=0) < limits).all():
            return None, ""
        return (values < 0) | (values >= limits), "0 or more, and less than its table's rows"
