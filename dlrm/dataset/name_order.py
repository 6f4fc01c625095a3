"""The order in time of raw files, as their names tell it."""

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from dlrm.errors import ConfigError

PACKINGS = (".gz", ".zst")
_DIGITS = re.compile(r"([0-9]+)")
_YEAR_LAST = re.compile(
    r"(?<![0-9])(?P<first>[0-9]{1,2}(?=[-._])|[0-9]{2})(?P<between>[-._]?)(?P<second>[0-9]{1,2}(?=[-._])|[0-9]{2})(?P=between)"
    r"(?P<year>(?:19|20)[0-9]{2})(?![0-9])"
)
_MONTH_AND_YEAR = re.compile(
    r"(?<![0-9])(?<![0-9][-._])(0?[1-9]|1[0-2])[-._]((?:19|20)[0-9]{2})(?![0-9])(?![-._][0-9])"
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?<![a-z])(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)(?![a-z])"
)
_NAMED_DATE = re.compile(  # 05Jan2024, jan-5-2024, Jan_2024, 2024-Jan-05, jan
    rf"(?:(?<![0-9])(?P<before>[0-9]{{1,2}}|(?:19|20)[0-9]{{2}})[-._]?)?{_MONTH}"
    r"(?:[-._]?(?P<after>[0-9]{1,2})(?![0-9]))?(?:[-._]?(?P<year>(?:19|20)[0-9]{2})(?![0-9]))?",
    re.IGNORECASE,
)
_YEAR_FIRST = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])[0-9]{2}")

Key = tuple[str | int, ...]
"""What a name is sorted by: its text and numbers in turn, text first."""


def order_files(given: Sequence[str]) -> tuple[list[str], str]:
    """The files in order of time, and a note on that order, which may be empty.

    The shell sorts names as text, which puts day_10 before day_2. If any two names differ first in a number, a list
    that is sorted as text is put in the order of the numbers. Any other list was ordered on purpose, and stays.

    Raises:
        ConfigError: if the list is sorted as text, and the names do not tell which order was meant.
    """
    orders = _orders_by_number(given)
    is_text = _is_sorted_as_text(given) if orders else all(map(_is_sorted_as_text, _kinds(given)))
    is_ordered = list(given) in orders if orders else all(map(_is_sorted_by_number, _kinds(given)))
    if is_text and (len(orders) > 1 or not (orders or is_ordered)):
        raise ConfigError(
            f"{given[0]} ... {given[-1]}: the files are sorted as text, and their names don't tell the order of time. "
            "Give them in that order, one after the other, or name them by dates with the year first."
        )
    if is_ordered:
        return list(given), ""
    if is_text:
        return orders[0], f"Taken in the order of the numbers in their names, not as text: {_swap(given, orders[0])}."
    return list(given), "Taken in the order given, which is not that of the numbers in their names."


def _orders_by_number(given: Sequence[str]) -> list[list[str]]:
    """The orders that the numbers in the names may mean; none if other text decides the order of some names."""
    paths = _with_numbered_months([without_packing(path) for path in given])
    readings = [[_with_year_first(path, day, 2 - day) for path in paths] for day in (0, 2)]
    orders: list[list[str]] = []
    for texts in [texts for texts in readings if "" not in texts] or [paths]:
        keys = [_key(text) for text in texts]
        order = [given[i] for i in sorted(range(len(given)), key=keys.__getitem__)]
        if _numbers_decide(keys) and order not in orders:
            orders.append(order)
    return orders


def _with_numbered_months(paths: list[str]) -> list[str]:
    """The paths with 05Jan2024 as 2024-01-05 and jan as 01, if each has one; and with 01-2024 as 2024-01."""

    def turn(match: re.Match[str]) -> str:
        before, month = match["before"] or "", _MONTHS.index(match["month"][:3].lower()) + 1
        year = match["year"] or (before if len(before) == 4 else "")
        day = match["after"] or (before if len(before) < 4 else "")
        return "-".join(filter(None, (year, f"{month:02}", day)))

    if all(len(_NAMED_DATE.findall(path)) == 1 for path in paths):
        return [_NAMED_DATE.sub(turn, path) for path in paths]
    return [_MONTH_AND_YEAR.sub(r"\2-\1", path) for path in paths]


def _with_year_first(path: str, day: int, month: int) -> str:
    """The path with dates like 31-01-2024 written as 2024-01-31; empty if one of them is not a date when read so.

    Args:
        day: place of the day in such a date, 0 or 2.
        month: place of the month.
    """
    dates = []

    def turn(match: re.Match[str]) -> str:
        if _YEAR_FIRST.fullmatch(match[0]):
            return match[0]
        parts = match["first"], "", match["second"]
        dates.append(1 <= int(parts[month]) <= 12 and 1 <= int(parts[day]) <= 31)
        return f"{match['year']}-{parts[month]}-{parts[day]}"

    turned = _YEAR_LAST.sub(turn, path)
    return turned if all(dates) else ""


def _key(text: str) -> Key:
    return tuple(int(part) if i % 2 else part for i, part in enumerate(_DIGITS.split(text)))


def _numbers_decide(keys: Sequence[Key]) -> bool:
    """Whether any two different keys differ first in a number. It is enough to compare neighbours in sorted order."""
    return all(_first_difference(one, other) % 2 for one, other in pairwise(sorted(keys)) if one != other)


def _first_difference(one: Key, other: Key) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)


def _kinds(given: Sequence[str]) -> list[list[str]]:
    """Groups of files whose names differ only in numbers, each group in the order given."""
    kinds: dict[str, list[str]] = {}
    for path in given:
        kinds.setdefault(_DIGITS.sub("0", without_packing(path)), []).append(path)
    return list(kinds.values())


def _is_sorted_by_number(given: Sequence[str]) -> bool:
    keys = [_key(without_packing(path)) for path in given]
    return keys == sorted(keys)


def _is_sorted_as_text(given: Sequence[str]) -> bool:
    """Whether a shell would sort them so: by bytes or, in many locales, by letters and digits only."""
    letters = [re.sub(r"[\W_]", "", path).casefold() for path in given]
    return list(given) == sorted(given) or letters == sorted(letters)


def _swap(given: Sequence[str], ordered: Sequence[str]) -> str:
    """Two files that have changed places, such as `day_2.tsv before day_10.tsv`."""
    at = next(i for i, (one, other) in enumerate(zip(given, ordered, strict=True)) if one != other)
    here, there = source_names([Path(ordered[at]), Path(given[at])])
    return f"{here} before {there}"


def without_packing(path: str) -> str:
    """The absolute path without .gz or .zst. Links are not resolved."""
    path = os.path.abspath(path)  # noqa: PTH100 - resolves `.` and `..`, but no links
    return next((path.removesuffix(packing) for packing in PACKINGS if path.endswith(packing)), path)


def source_names(raw: Sequence[Path]) -> list[str]:
    """A name for each file: its own or, if some files have the same name, its path within their common folder."""
    names = [path.name for path in raw]
    if len(set(names)) == len(names):
        return names
    paths = [Path.cwd() / path for path in raw]
    common = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, common) for path in paths]
