"""Finds binary Criteo days, checks their headers, and reads their rows.

Layout (that of the public TorchRec example): `day_{i}_dense.npy` float32 [rows, 13], `day_{i}_sparse.npy` int32
[rows, 26] (or int64, as torchrec's tsv_to_npys writes it), `day_{i}_labels.npy` int32 [rows, 1]. criteo_kaggle has one
"day" named `train`. Ids of multi-hot days lie in `day_{i}_sparse_multi_hot.npz` instead.
Shapes: B rows, I integer features.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dlrm.dataset.arrays import DTYPES, PARTS
from dlrm.dataset.days import (
    KAGGLE_DAY,
    array_path,
    day_numbers,
    multi_hot_path,
    num_validation_rows,
)
from dlrm.dataset.manifest import check_manifest
from dlrm.dataset.multi_hot import map_multi_hot
from dlrm.dataset.rows import Rows
from dlrm.errors import DatasetError
from dlrm.schema.criteo import NO_LABEL, num_kaggle_training_rows
from dlrm.system.files import read_npy_header
from dlrm.system.limits import allow_open_files

Stage = Literal["train", "val", "test"]
STAGES: tuple[Stage, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Day:
    """The arrays of a day, memory mapped.

    Attributes:
        name: such as day_3; the names of its files begin with it.
        dense: float32 [rows, 13].
        ids: one array [rows, 26], or 26 arrays [rows, hotness].
        labels: int32 [rows, 1].
        paths: files of `dense`, `sparse` and `labels`.
    """

    name: str
    dense: npt.NDArray[np.float32]
    ids: tuple[npt.NDArray[np.integer], ...]
    labels: npt.NDArray[np.int32]
    paths: Mapping[str, Path]

    @property
    def num_rows(self) -> int:
        """Rows in the day's files."""
        return len(self.dense)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each array of ids."""
        return tuple(array.shape[1] for array in self.ids)


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a day."""

    day: Day
    start: int
    stop: int


@dataclass(frozen=True)
class DayRows:
    """The rows of a split, in order: pieces of one or more days."""

    pieces: tuple[Piece, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the split."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each array of ids."""
        return self.pieces[0].day.widths

    def read(self, start: int, stop: int) -> Rows:
        """Copies rows [start, stop) of the split, checked.

        Raises:
            DatasetError: if a dense value is not finite, an id negative, or a label neither 0 nor 1.
        """
        return self._join(_read_checked(day, rows) for day, rows in self._ranges(start, stop))

    def take(self, rows_B: npt.NDArray[np.int64]) -> Rows:
        """Copies rows of the split, given by their numbers in ascending order, checked as in `read`."""
        parts = []
        first = low = 0
        for piece in self.pieces:
            stop = first + piece.stop - piece.start
            high = int(np.searchsorted(rows_B, stop))
            if low < high:
                parts.append(_read_checked(piece.day, rows_B[low:high] + (piece.start - first)))
            first, low = stop, high
        return self._join(parts)

    def read_dense(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Copies only the integers of rows [start, stop), checked: [B, I]."""
        return np.concatenate([_read_dense(day, rows) for day, rows in self._ranges(start, stop)])

    def read_labels(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Copies only the labels of rows [start, stop), checked: [B]."""
        return np.concatenate([_read_labels(day, rows) for day, rows in self._ranges(start, stop)])

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[Day, range]]:
        """Rows [start, stop) of the split, as ranges of rows of days."""
        first = 0
        for piece in self.pieces:
            size = piece.stop - piece.start
            low, high = max(start - first, 0), min(stop - first, size)
            if low < high:
                yield piece.day, range(piece.start + low, piece.start + high)
            first += size

    def _join(self, parts: Iterable[Rows]) -> Rows:
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return Rows.empty(0, self.widths)
        return Rows(
            np.concatenate([rows.dense_BI for rows in parts]),
            tuple(np.concatenate(arrays) for arrays in zip(*(rows.ids for rows in parts), strict=True)),
            np.concatenate([rows.labels_B for rows in parts]),
        )


def open_splits(
    folder: Path, dataset_name: str, multi_hot_folder: Path | None = None, needs_training: bool = True
) -> dict[Stage, DayRows]:
    """Finds the days of `folder`, checks every header, and says which rows train, validate and test.

    criteo_1t: all days but the last one train, and the last one is held out. criteo_kaggle: the first 6/7 of the rows
    train, and the rest is held out. Of the held-out rows the first half validates, and the rest tests. No row is in two
    splits.

    Args:
        multi_hot_folder: folder that the ids come from; `folder` then needs no `day_{i}_sparse.npy`. None for `folder`.
        needs_training: whether rows that train are needed. If not, only the last day is opened, whatever its number;
            there need not be others. For a model of criteo_kaggle it may be `train`, or a later day.

    Raises:
        DatasetError: naming the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder. Expected one with day_0_dense.npy, day_0_sparse.npy, ...")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise DatasetError(f"{folder}: no permission to read it. Change its mode, or run as its owner.")
    is_split = dataset_name == "criteo_kaggle" and (needs_training or not _has_only_days(folder))
    names = [KAGGLE_DAY] if is_split else _day_names(folder, needs_training)
    check_manifest(folder, needs_ids=multi_hot_folder is None, held_out=None if needs_training else names[-1])
    if is_split:
        day = _open_day(folder, KAGGLE_DAY, multi_hot_folder)
        num_training_rows = num_kaggle_training_rows(day.num_rows)
        training, held_out = [Piece(day, 0, num_training_rows)], Piece(day, num_training_rows, day.num_rows)
    else:
        allow_open_files(len(names) * len(PARTS), str(folder))
        *earlier, last = [_open_day(folder, name, multi_hot_folder) for name in names]
        training, held_out = [Piece(day, 0, day.num_rows) for day in earlier], Piece(last, 0, last.num_rows)
    middle = held_out.start + num_validation_rows(held_out.stop - held_out.start)
    splits: dict[Stage, DayRows] = {
        "train": DayRows(tuple(training)),
        "val": DayRows((Piece(held_out.day, held_out.start, middle),)),
        "test": DayRows((Piece(held_out.day, middle, held_out.stop),)),
    }
    if not needs_training:
        del splits["train"]
    for stage, rows in splits.items():
        if rows.num_rows == 0:
            raise DatasetError(
                f"{folder}: no rows to {'train' if stage == 'train' else stage} on. Expected one at least."
            )
    return splits


def _has_only_days(folder: Path) -> bool:
    """Whether the folder has no train_dense.npy, but a numbered day."""
    return not array_path(folder, KAGGLE_DAY, "dense").exists() and any(folder.glob("day_*_dense.npy"))


def _day_names(folder: Path, needs_training: bool) -> list[str]:
    """Names of the days to open: all of them, or only the last one."""
    found = day_numbers((path.name for path in folder.iterdir()), r"\w+\.npy")
    if not found and any(folder.glob("day_*_sparse_multi_hot.npz")):
        raise DatasetError(
            f"{folder}: holds only ids, as `dlrm materialize` writes them. Give it as "
            "--synthetic_multi_hot_criteo_path, and the days that they were made from, for integers and labels, as "
            "--in_memory_binary_criteo_path."
        )
    if not found:
        raise DatasetError(
            f"{folder}: no day_0_dense.npy. Expected binary Criteo days, or --dataset_name criteo_kaggle with "
            "train_dense.npy. Write them with `dlrm preprocess`."
        )
    if not needs_training:
        return [f"day_{found[-1]}"]
    if len(found) == 1:
        raise DatasetError(f"{folder}: one day only (day_{found[0]}). Expected two or more: the last is held out.")
    missing = next((expected for expected, number in enumerate(found) if number != expected), None)
    if missing is not None:
        raise DatasetError(
            f"{folder}: day_{missing}_dense.npy is missing, with days up to {found[-1]} there. Expected days without "
            "a gap from 0."
        )
    return [f"day_{i}" for i in found]


def _open_day(folder: Path, name: str, multi_hot_folder: Path | None) -> Day:
    paths = {part: array_path(folder, name, part) for part in PARTS}
    dense, labels = (_open_array(paths[part], PARTS[part], DTYPES[part]) for part in ("dense", "labels"))
    if multi_hot_folder is None:
        ids: tuple[npt.NDArray[np.integer], ...] = (_open_array(paths["sparse"], PARTS["sparse"], DTYPES["sparse"]),)
    else:
        paths["sparse"] = multi_hot_path(multi_hot_folder, name)
        ids = tuple(map_multi_hot(paths["sparse"]))
    for part, array in (*(("sparse", array) for array in ids), ("labels", labels)):
        if len(array) != len(dense):
            raise DatasetError(
                f"{paths[part]}: {len(array):,} rows, expected {len(dense):,} as in {paths['dense'].name}. "
                "The files of a day belong together: write them again."
            )
    if len(labels) and labels[0, 0] == NO_LABEL:
        raise DatasetError(
            f"{paths['labels']}: its rows have no labels ({NO_LABEL}), so they can't be trained on or scored. "
            "Give rows with labels."
        )
    return Day(name, dense, ids, labels, paths)


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
        raise DatasetError(f"{path}: dtype {dtype}, expected {names}. Convert it, or preprocess the logs again.")
    if len(shape) != 2 or shape[1] != columns or fortran_order:
        order = " in column order" if fortran_order else ""
        raise DatasetError(f"{path}: shape {list(shape)}{order}, expected [rows, {columns}] in row order.")
    expected = offset + shape[0] * columns * dtype.itemsize
    if size != expected:
        raise DatasetError(
            f"{path}: {size:,} bytes, expected {expected:,} ({shape[0]:,} rows x {columns * dtype.itemsize} B and a "
            "header). It was cut short or overwritten: copy or write it again."
        )
    if shape[0] == 0:
        return np.empty(shape, dtype)  # an empty file can't be mapped
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _read_checked(day: Day, rows_B: range | npt.NDArray[np.int64]) -> Rows:
    """Copies rows of a day, given by their numbers, and checks their values."""
    ids = tuple(_take(array, rows_B) for array in day.ids)
    rows = Rows(_read_dense(day, rows_B), ids, _read_labels(day, rows_B))
    for feature, ids in enumerate(rows.ids):
        if ids.min(initial=0) < 0:
            row, column = np.argwhere(ids < 0)[0]
            member = f" of member {feature}" if len(rows.ids) > 1 else ""
            raise DatasetError(
                f"{day.paths['sparse']}: id {ids[row, column]} at row {rows_B[row]}, column {column}{member}, expected "
                "0 or more. Preprocess the logs again."
            )
    return rows


def _read_dense(day: Day, rows_B: range | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    dense_BI = _take(day.dense, rows_B)
    if not np.isfinite(dense_BI).all():
        row, column = np.argwhere(~np.isfinite(dense_BI))[0]
        raise DatasetError(
            f"{day.paths['dense']}: {dense_BI[row, column]} at row {rows_B[row]}, column {column}, expected a "
            "finite number. Preprocess the logs again."
        )
    return dense_BI


def _read_labels(day: Day, rows_B: range | npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    labels_B = _take(day.labels, rows_B)[:, 0]
    wrong = (labels_B != 0) & (labels_B != 1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DatasetError(
            f"{day.paths['labels']}: label {labels_B[row]} at row {rows_B[row]}, expected 0 or 1. "
            "Preprocess the logs again."
        )
    return labels_B


def _take(array: npt.NDArray[Any], rows_B: range | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    if isinstance(rows_B, range):
        return np.array(array[rows_B.start : rows_B.stop])
    return np.asarray(array).take(rows_B, axis=0)
