"""Binary Criteo days: found, checked, and read row by row.

Layout (that of the public TorchRec example): `day_{i}_dense.npy` float32 [rows, 13], `day_{i}_sparse.npy` int32
[rows, 26] (int64 as torchrec's tsv_to_npys leaves it is read too), `day_{i}_labels.npy` int32 [rows, 1].
For criteo_kaggle one "day" named `train`. Shapes: B rows, I integer features, F categorical features.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dlrm.artifacts import MANIFEST_NAME, MANIFEST_VERSION, read_npy_header
from dlrm.data.batch import Rows
from dlrm.errors import DatasetError
from dlrm.schema import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES, num_kaggle_training_rows

Stage = Literal["train", "val", "test"]

_PARTS = {
    "dense": (NUM_INTEGER_FEATURES, (np.dtype("<f4"),)),
    "sparse": (NUM_CATEGORICAL_FEATURES, (np.dtype("<i4"), np.dtype("<i8"))),
    "labels": (1, (np.dtype("<i4"),)),
}


@dataclass(frozen=True)
class Day:
    """The three arrays of a day, memory mapped."""

    folder: Path
    name: str
    dense: npt.NDArray[np.float32]
    sparse: npt.NDArray[np.integer]
    labels: npt.NDArray[np.int32]

    @property
    def num_rows(self) -> int:
        """Rows in the day's files."""
        return len(self.dense)

    def path(self, part: str) -> Path:
        """File of `dense`, `sparse` or `labels`."""
        return _part_path(self.folder, self.name, part)


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a day."""

    day: Day
    start: int
    stop: int


@dataclass(frozen=True)
class DayRows:
    """The rows of a split, over one or more days, in order."""

    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    def read(self, start: int, stop: int) -> Rows:
        """Copies rows [start, stop) of the split, checked.

        Raises:
            DatasetError: at a dense value that is not finite, a negative id, or a label other than 0 and 1.
        """
        parts = []
        first = 0
        for piece in self.pieces:
            size = piece.stop - piece.start
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                parts.append(_read_checked(piece.day, piece.start + low, piece.start + high))
            first += size
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Rows(
                np.empty((0, NUM_INTEGER_FEATURES), np.float32),
                np.empty((0, NUM_CATEGORICAL_FEATURES), np.int32),
                np.empty(0, np.int32),
            )
        return Rows(
            np.concatenate([rows.dense_BI for rows in parts]),
            np.concatenate([rows.ids_BN for rows in parts]),
            np.concatenate([rows.labels_B for rows in parts]),
        )


def open_splits(folder: Path, dataset_name: str) -> dict[Stage, DayRows]:
    """Finds the days of `folder`, checks every header, and says which rows train, validate and test.

    criteo_1t: all days but the last train; the last day's first half (the larger where odd) validates, the rest tests.
    criteo_kaggle: the first 6/7 of the rows train, and the rest is split in the same way. No row is in two splits.

    Raises:
        DatasetError: naming the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder. Expected one with day_0_dense.npy, day_0_sparse.npy, ...")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DatasetError(f"{folder}: no permission to read it. Change its mode, or run as its owner.")
    _check_manifest(folder)
    if dataset_name == "criteo_kaggle":
        day = _open_day(folder, "train")
        num_training_rows = num_kaggle_training_rows(day.num_rows)
        training, held_out = [Piece(day, 0, num_training_rows)], Piece(day, num_training_rows, day.num_rows)
    else:
        *earlier, last = [_open_day(folder, name) for name in _day_names(folder)]
        training, held_out = [Piece(day, 0, day.num_rows) for day in earlier], Piece(last, 0, last.num_rows)
    middle = held_out.start + -(-(held_out.stop - held_out.start) // 2)
    splits: dict[Stage, DayRows] = {
        "train": DayRows(tuple(training)),
        "val": DayRows((Piece(held_out.day, held_out.start, middle),)),
        "test": DayRows((Piece(held_out.day, middle, held_out.stop),)),
    }
    for stage, rows in splits.items():
        if rows.num_rows == 0:
            raise DatasetError(
                f"{folder}: no rows to {'train' if stage == 'train' else stage} on. Expected one at least."
            )
    return splits


def _day_names(folder: Path) -> list[str]:
    found = sorted(
        {int(match[1]) for path in folder.iterdir() if (match := re.match(r"day_(\d+)_\w+\.npy$", path.name))}
    )
    if not found:
        raise DatasetError(
            f"{folder}: no day_0_dense.npy. Expected binary Criteo days, or --dataset_name criteo_kaggle with "
            "train_dense.npy. Write them with `dlrm preprocess`."
        )
    if len(found) == 1:
        raise DatasetError(f"{folder}: one day only (day_{found[0]}). Expected two or more: the last is held out.")
    missing = next((expected for expected, number in enumerate(found) if number != expected), None)
    if missing is not None:
        raise DatasetError(
            f"{folder}: {_part_path(folder, f'day_{missing}', 'dense').name} is missing, with days up to "
            f"{found[-1]} there. Expected days without a gap from 0."
        )
    return [f"day_{i}" for i in found]


def _part_path(folder: Path, name: str, part: str) -> Path:
    return folder / f"{name}_{part}.npy"


def _open_day(folder: Path, name: str) -> Day:
    arrays = {part: _open_array(_part_path(folder, name, part), *expected) for part, expected in _PARTS.items()}
    day = Day(folder, name, arrays["dense"], arrays["sparse"], arrays["labels"])
    for part, array in arrays.items():
        if len(array) != day.num_rows:
            raise DatasetError(
                f"{day.path(part)}: {len(array):,} rows, expected {day.num_rows:,} as in {day.path('dense').name}. "
                "The three files of a day belong together: write them anew."
            )
    return day


def _open_array(path: Path, columns: int, dtypes: Sequence[np.dtype[Any]]) -> npt.NDArray[Any]:
    names = " or ".join(dtype.name for dtype in dtypes)
    if path.exists() and not path.is_file():
        raise DatasetError(f"{path}: not a regular file. Expected an array of {names} [rows, {columns}].")
    try:
        with path.open("rb") as file:
            shape, fortran_order, dtype = read_npy_header(file)
            offset, size = file.tell(), path.stat().st_size
    except FileNotFoundError:
        raise DatasetError(f"{path}: missing. Expected an array of {names} [rows, {columns}].") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable .npy file ({error}). Expected {names} [rows, {columns}].") from None
    if dtype not in dtypes:
        raise DatasetError(f"{path}: dtype {dtype}, expected {names}. Convert it, or preprocess the logs anew.")
    if len(shape) != 2 or shape[1] != columns or fortran_order:
        order = " in column order" if fortran_order else ""
        raise DatasetError(f"{path}: shape {list(shape)}{order}, expected [rows, {columns}] in row order.")
    expected = offset + shape[0] * columns * dtype.itemsize
    if size != expected:
        raise DatasetError(
            f"{path}: {size:,} bytes, expected {expected:,} ({shape[0]:,} rows x {columns * dtype.itemsize} B and a "
            "header). It was cut short or overwritten: copy or write it anew."
        )
    if shape[0] == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _check_manifest(folder: Path) -> None:
    """Where there is a manifest, its files must be there with the sizes it states."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["version"], manifest["files"]
        sizes = {str(name): int(entry["bytes"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DatasetError(f"{path}: not a manifest ({error!r}). Remove it to read the folder without one.") from None
    if version != MANIFEST_VERSION:
        raise DatasetError(
            f"{path}: version {version}, this dlrm reads {MANIFEST_VERSION}. Use the dlrm that wrote it."
        )
    for name, size in sizes.items():
        file = folder / name
        if not file.exists():
            raise DatasetError(f"{file}: missing, though {MANIFEST_NAME} lists it. Copy or write the folder anew.")
        if file.stat().st_size != size:
            raise DatasetError(
                f"{file}: {file.stat().st_size:,} bytes, expected {size:,} as {MANIFEST_NAME} states. "
                "Copy or write the folder anew."
            )


def _read_checked(day: Day, start: int, stop: int) -> Rows:
    rows = Rows(np.array(day.dense[start:stop]), np.array(day.sparse[start:stop]), np.array(day.labels[start:stop, 0]))
    if not np.isfinite(rows.dense_BI).all():
        row, column = np.argwhere(~np.isfinite(rows.dense_BI))[0]
        raise DatasetError(
            f"{day.path('dense')}: {rows.dense_BI[row, column]} at row {start + row}, column {column}, expected a "
            "finite number. Preprocess the logs anew."
        )
    if rows.ids_BN.min(initial=0) < 0:
        row, column = np.argwhere(rows.ids_BN < 0)[0]
        raise DatasetError(
            f"{day.path('sparse')}: id {rows.ids_BN[row, column]} at row {start + row}, column {column}, expected 0 or "
            "more. Preprocess the logs anew."
        )
    wrong = (rows.labels_B != 0) & (rows.labels_B != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DatasetError(
            f"{day.path('labels')}: label {rows.labels_B[row]} at row {start + row}, expected 0 or 1. "
            "Preprocess the logs anew."
        )
    return rows
