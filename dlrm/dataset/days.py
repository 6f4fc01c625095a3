"""Names of days and of their files, and which rows are held out.

Days are called day_0, day_1, ...; the single file of criteo_kaggle is called train.
"""

import re
from collections.abc import Iterable
from pathlib import Path

KAGGLE_DAY = "train"
MULTI_HOT = "sparse_multi_hot.npz"
"""Ids of a day that has several for each feature, after the day's name and a `_`."""


def day_of(file_name: str, part: str = ".+") -> str | None:
    """The day that a file belongs to by its name, such as day_3 for day_3_dense.npy; None if it belongs to none.

    Args:
        part: regular expression for what follows the day's name and a `_`.
    """
    match = re.fullmatch(rf"(day_\d+|{KAGGLE_DAY})_(?:{part})", file_name)
    return match[1] if match else None


def day_number(day: str) -> int | None:
    """3 for day_3; None for train."""
    return None if day == KAGGLE_DAY else int(day.removeprefix("day_"))


def day_numbers(file_names: Iterable[str], part: str = ".+") -> list[int]:
    """Numbers of the days that the files belong to, ascending. See `day_of`."""
    days = {day for name in file_names if (day := day_of(name, part)) is not None}
    return sorted({number for day in days if (number := day_number(day)) is not None})


def array_path(folder: Path, day: str, part: str) -> Path:
    """File of a day's `dense`, `sparse` or `labels`."""
    return folder / f"{day}_{part}.npy"


def multi_hot_path(folder: Path, day: str) -> Path:
    """File of the ids of a multi-hot day."""
    return folder / f"{day}_{MULTI_HOT}"


def last_day(days: Iterable[str]) -> str:
    """The day that is held out: of day_0, day_1, ..., in any order, the one with the largest number."""
    return max(days, key=lambda day: (len(day), day))


def num_validation_rows(num_held_out: int) -> int:
    """Rows that validate: the first half of the held-out rows, the larger one of an odd number. The rest tests."""
    return num_held_out - num_held_out // 2
