"""Checks binary days without a manifest, as MLPerf and others publish them.

Shapes: R rows, H hotness of a feature, F categorical features.
"""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.dataset.arrays import ARRAY, PARTS, measure_file
from dlrm.dataset.days import KAGGLE_DAY, MULTI_HOT, array_path, day_numbers, day_of, multi_hot_path
from dlrm.dataset.multi_hot import map_multi_hot
from dlrm.dataset.sums import Sum
from dlrm.errors import DatasetError
from dlrm.schema.criteo import NO_LABEL, NUM_CATEGORICAL_FEATURES
from dlrm.system.console import Progress
from dlrm.system.files import read_npy_header
from dlrm.system.host import available_cores
from dlrm.system.threads import in_order

_PART = rf"{ARRAY}|{re.escape(MULTI_HOT)}"
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class BareDay:
    """Facts about a day, from its files.

    Attributes:
        positives: rows with label 1; None if rows have no labels, or the folder has only ids.
        largest_F: largest id of each feature.
    """

    name: str
    rows: int
    positives: int | None
    largest_F: npt.NDArray[np.int64]


def verify_bare(folder: Path, sums: Mapping[str, Sum]) -> list[BareDay]:
    """Checks types, shapes, numbers of rows, every value, and the checksums in `sums`; returns the days in order.

    Raises:
        DatasetError: naming the file, what was found and what was expected.
    """
    names = _find_days(folder)
    files = [path for path in folder.iterdir() if day_of(path.name, _PART) or path.name in sums]
    progress = Progress("Verifying", sum(path.stat().st_size for path in files), "bytes")
    days = [_verify_day(folder, name, sums, progress) for name in names]
    for name in sorted(sums.keys() - {path.name for path in files if day_of(path.name, _PART)}):
        _check_sum(folder / name, sums, measure_file(folder / name, None, None, progress, digests=_digests(name, sums)))
    progress.close()
    return days


def _find_days(folder: Path) -> list[str]:
    """Names of the days, in order."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder. Expected one with binary days.")
    files = [path.name for path in folder.iterdir()]
    if not any(day_of(name, _PART) for name in files):
        raise DatasetError(
            f"{folder}: has neither manifest.json nor binary days. Expected what `dlrm preprocess` wrote, or "
            "day_0_dense.npy, day_0_sparse.npy, ..."
        )
    if any(day_of(name, _PART) == KAGGLE_DAY for name in files):
        return [KAGGLE_DAY]
    numbers = day_numbers(files, _PART)
    for one, other in pairwise(numbers):
        if other != one + 1:
            raise DatasetError(f"{folder}: has day_{one} and day_{other}, and no day_{one + 1}. Fetch what is missing.")
    return [f"day_{number}" for number in numbers]


def _verify_day(folder: Path, name: str, sums: Mapping[str, Sum], progress: Progress) -> BareDay:
    paths = {part: array_path(folder, name, part) for part in PARTS}
    multi_hot = multi_hot_path(folder, name)
    parts = [part for part, path in paths.items() if path.exists() or not (part == "sparse" and multi_hot.exists())]
    if not any(path.exists() for path in paths.values()):
        parts = []  # a folder of ids only, as `dlrm materialize` writes it
    rows = {part: _read_rows(paths[part]) for part in parts}
    has_labels = "labels" not in rows or _first_label(paths["labels"]) != NO_LABEL

    def measure(part: str) -> dict[str, Any]:
        path, expected = paths[part], rows["dense"]
        facts = measure_file(path, expected, None, progress, has_labels, _digests(path.name, sums))
        _check_sum(path, sums, facts)
        return facts

    with ThreadPoolExecutor(available_cores()) as pool:
        facts = dict(in_order(pool, parts, measure, available_cores()))
    largest_F = facts.get("sparse", {}).get("largest", np.full(NUM_CATEGORICAL_FEATURES, -1, np.int64))
    if multi_hot.exists():
        count = rows.get("dense")
        count, largest_of_members_F = _check_multi_hot(multi_hot, count)
        rows["dense"], largest_F = count, np.maximum(largest_F, largest_of_members_F)
        _check_sum(
            multi_hot, sums, measure_file(multi_hot, None, None, progress, digests=_digests(multi_hot.name, sums))
        )
    return BareDay(name, rows["dense"], facts.get("labels", {}).get("positives"), largest_F)


def _read_rows(path: Path) -> int:
    """Rows by the header. The rest of the header is checked later, together with the values."""
    if not path.is_file():
        raise DatasetError(f"{path}: missing. Expected dense, sparse and labels of each day. Fetch it again.")
    try:
        with path.open("rb") as file:
            shape, _, _ = read_npy_header(file)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not a readable .npy file ({error}). Fetch it again.") from None
    return shape[0] if shape else 0


def _first_label(path: Path) -> int | None:
    with path.open("rb") as file:
        read_npy_header(file)
        labels = np.fromfile(file, np.int32, 1)
    return int(labels[0]) if len(labels) else None


def _check_multi_hot(path: Path, rows: int | None) -> tuple[int, npt.NDArray[np.int64]]:
    """Rows of a multi-hot day, and the largest id of each feature.

    Args:
        rows: expected rows; None for those of the first member.
    """
    largest = []
    for feature, ids_RH in enumerate(map_multi_hot(path)):
        rows = len(ids_RH) if rows is None else rows
        if len(ids_RH) != rows:
            raise DatasetError(f"{path}: member {feature} has {len(ids_RH):,} rows, expected {rows:,}. Fetch it again.")
        most = -1
        for start in range(0, rows, _ROWS_AT_ONCE):
            block = ids_RH[start : start + _ROWS_AT_ONCE]
            if block.min() < 0:
                row, column = np.argwhere(block < 0)[0]
                raise DatasetError(
                    f"{path}: id {block[row, column]} at row {start + row}, column {column} of member {feature}, "
                    "expected 0 or more. Fetch it again."
                )
            most = max(most, int(block.max()))
        largest.append(most)
    assert rows is not None
    return rows, np.array(largest, np.int64)


def _digests(name: str, sums: Mapping[str, Sum]) -> tuple[str, ...]:
    return (sums[name].algorithm,) if name in sums else ()


def _check_sum(path: Path, sums: Mapping[str, Sum], facts: Mapping[str, Any]) -> None:
    if (one := sums.get(path.name)) is not None:
        one.check(path, facts[one.algorithm])
