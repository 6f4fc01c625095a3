"""The order in time of raw files, as their names tell it."""

import os
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from dlrm.errors import ConfigError

PACKINGS = (".gz", ".zst")
_DIGITS = re.compile(r"([0-9]+)")
_DATE = re.compile(  # 31-01-2024, 31012024, 31-01-24, 310124
    r"(?<![0-9])(?<![0-9][-._])(?:(?P<a>[0-9]{1,2})(?P<sign>[-._])(?P<b>[0-9]{1,2})(?P=sign)(?P<c>(?:19|20)?[0-9]{2})"
    r"|(?P<aa>[0-9]{2})(?P<bb>[0-9]{2})(?P<cc>(?:19|20)?[0-9]{2}))(?![0-9]|[-._][0-9])"
)
_MONTH_AND_YEAR = re.compile(
    r"(?<![0-9])(?<![0-9][-._])(0?[1-9]|1[0-2])[-._]((?:19|20)[0-9]{2})(?![0-9])(?![-._][0-9])"
)
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_NAMED_DATE = re.compile(  # 05Jan2024, jan-5-2024, Jan_24, 2024-Jan-05, jan
    r"(?:(?<![0-9])(?P<before>[0-9]{1,2}|(?:19|20)[0-9]{2})[-._]?)?"
    r"(?<![a-z])(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)(?![a-z])"
    r"(?:[-._]?(?P<after>[0-9]{1,2})(?![0-9]))?(?:[-._]?(?P<year>(?:19|20)[0-9]{2})(?![0-9]))?",
    re.IGNORECASE,
)
_YEAR_FIRST = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])[0-9]{2}")
_DENSER = 3
"""Files of a log follow each other in time. A reading of their names as dates counts if none is so much denser."""

Parts = tuple[int, int, int]
"""Year, month, day. Without a year, or a day, these are 0."""

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
    paths = [without_packing(path) for path in given]
    orders: list[list[str]] = []
    for texts in _readings(paths) or [[_MONTH_AND_YEAR.sub(r"\2-\1", path) for path in paths]]:
        keys = [_key(text) for text in texts]
        order = [given[i] for i in sorted(range(len(given)), key=keys.__getitem__)]
        if _numbers_decide(keys) and order not in orders:
            orders.append(order)
    return orders


def _readings(paths: Sequence[str]) -> list[list[str]]:
    """The names with their dates written as 2024-01-31, once for each order of day, month and year that makes sense.

    Empty if some name has no date, or several. `24-01-31` may be of 2024 or of 2031; what tells is that the files of a
    log follow each other: a reading by which they are spread over years loses to one by which they are not.
    """
    for pattern, meanings in ((_NAMED_DATE, _meanings_by_name), (_DATE, _meanings)):
        found = [list(pattern.finditer(path)) for path in paths]
        if all(len(matches) == 1 for matches in found):
            return _dense_readings(paths, [matches[0] for matches in found], meanings)
    return []


def _dense_readings(
    paths: Sequence[str], found: Sequence[re.Match[str]], meanings: Callable[[re.Match[str]], list[Parts | None]]
) -> list[list[str]]:
    readings = []
    for dates in zip(*map(meanings, found), strict=True):
        sound = [date for date in dates if date is not None]
        if len(sound) == len(paths):
            readings.append((max(map(_days, sound)) - min(map(_days, sound)), sound))
    least = min((span for span, _ in readings), default=0)
    return [
        [
            f"{path[: match.start()]}{year:04}-{month:02}-{day:02}{path[match.end() :]}"
            for path, match, (year, month, day) in zip(paths, found, sound, strict=True)
        ]
        for span, sound in readings
        if span <= _DENSER * max(1, least)
    ]


def _meanings(match: re.Match[str]) -> list[Parts | None]:
    """A date in numbers: the day first, the month first, the year first. None for what is no date."""
    a, b, c = (int(match[one] or match[two]) for one, two in (("a", "aa"), ("b", "bb"), ("c", "cc")))
    if _YEAR_FIRST.fullmatch(match[0]):
        return [(int(match[0][:4]), int(match[0][4:6]), int(match[0][6:]))] * 3
    year_first = _date(a, b, c) if c < 100 else None
    return [_date(c, b, a), _date(c, a, b), year_first]


def _meanings_by_name(match: re.Match[str]) -> list[Parts | None]:
    """A date with the month in letters: the number before it is the day, or the one after it is, or neither."""
    month = _MONTHS.index(match["month"][:3].lower()) + 1
    before, after, year = (int(match[name] or 0) for name in ("before", "after", "year"))
    if year or before >= 100:
        day = after if before >= 100 or not before else before
        return [_date(year or before, month, day or 1)] * 3
    return [_date(after, month, before or 1), _date(before, month, after or 1), None]


def _date(year: int, month: int, day: int) -> Parts | None:
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return None
    return (year + 2000 if 0 < year < 100 else year), month, day


def _days(date: Parts) -> int:
    """Days since the year 0, near enough to compare distances."""
    year, month, day = date
    return year * 366 + month * 31 + day


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
