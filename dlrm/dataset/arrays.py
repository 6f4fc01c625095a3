"""The arrays of a day, and what their values may be."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dlrm.errors import DatasetError
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES
from dlrm.system.console import Progress
from dlrm.system.files import read_npy_header

_CHUNK_BYTES = 4 << 20
_DTYPES = {
    "dense": (np.dtype("<f4"),),
    "sparse": (np.dtype("<i4"), np.dtype("<i8")),
    "labels": (np.dtype("<i4"),),
}
PARTS = {"dense": NUM_INTEGER_FEATURES, "sparse": NUM_CATEGORICAL_FEATURES, "labels": 1}
"""The arrays of a day, and their columns."""


def rows_of(name: str, rows: Mapping[str, int]) -> int | None:
    """Rows of an array file; None for a file of another kind."""
    return next((rows[day] for day in rows for part in PARTS if name == f"{day}_{part}.npy"), None)


def measure_file(
    path: Path,
    rows: int | None,
    table_rows: Sequence[int] | None,
    progress: Progress | None = None,
    has_labels: bool = True,
    digests: Sequence[str] = ("sha256",),
) -> dict[str, Any]:
    """Size and checksums of a file in one pass, and, of an array of a day, checks of its values.

    Args:
        rows: rows of the day; None for a file that is not an array.
        table_rows: ids of column c are below table_rows[c]; None where there is no such bound.
        has_labels: whether labels are 0 and 1; all are -1 otherwise.
        digests: algorithms of hashlib.

    Raises:
        DatasetError: at a header that does not fit, or a value that can't be.
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
        raise DatasetError(f"{path}: not a readable .npy file ({error}). Copy or write the folder anew.") from None
    expected = (rows, PARTS[part])
    if shape != expected or fortran_order or dtype not in _DTYPES[part]:
        raise DatasetError(
            f"{path}: {dtype!s:.40} {list(shape)}, expected {_DTYPES[part][0]} {list(expected)}. Copy or write the "
            "folder anew."
        )
    size = file.tell() + rows * PARTS[part] * dtype.itemsize
    if path.stat().st_size != size:
        raise DatasetError(
            f"{path}: {path.stat().st_size:,} bytes, expected {size:,} by its header. Copy or write the folder anew."
        )
    return dtype


class _ArrayChecker:
    """Values of one array, a chunk of whole rows at a time."""

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
        """Checks some rows."""
        values = np.frombuffer(chunk, self._dtype).reshape(-1, PARTS[self.part])
        bad, expected = self._find_bad(values)
        if bad is not None:
            row, column = np.argwhere(bad)[0]
            raise DatasetError(
                f"{self.path}: {values[row, column]} at row {self._row + row}, column {column}, expected {expected}. "
                "Preprocess the logs anew."
            )
        self._row += len(values)

    def _find_bad(self, values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.bool_] | None, str]:
        """Which values can't be, None for none, and what was expected."""
        if self.part == "dense":
            return None if np.isfinite(values).all() else ~np.isfinite(values), "a finite number"
        if self.part == "labels" and not self._has_labels:
            return (values != -1) if (values != -1).any() else None, "-1 in rows without labels"
        if self.part == "labels":
            self.positives += int(values.sum())
            return (values < 0) | (values > 1) if values.min() < 0 or values.max() > 1 else None, "0 or 1"
        limits = np.full(values.shape[1], np.iinfo(values.dtype).max) if self._limits is None else self._limits
        self.largest_F = np.maximum(self.largest_F, values.max(axis=0))
        if values.min() >= 0 and (values.max(axis=0) < limits).all():
            return None, ""
        return (values < 0) | (values >= limits), "0 or more, and less than its table's rows"
