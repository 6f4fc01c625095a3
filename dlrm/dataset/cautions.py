"""Lines that a run prints about its data before it begins, from a look at a few rows of each day.

They say which rows train, which days are copies, and which ids are not indices. Shapes: F categorical features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from dlrm.dataset.binary_days import Day, DayRows, Piece, Stage
from dlrm.dataset.days import KAGGLE_DAY
from dlrm.dataset.manifest import MANIFEST_NAME, load_manifest
from dlrm.errors import DatasetError
from dlrm.schema.criteo import CATEGORICAL_NAMES

_SPANS, _SPAN_ROWS = 16, 256
LEAST_ROWS = 32
_APART = 0.5
_SHOWN_FEATURES = 4

Shares = npt.NDArray[np.float64]
"""For each feature, the share of its ids that are not below the table's rows: [F]."""


def describe_days(rows: Mapping[Stage, DayRows]) -> str:
    """Says which days train and which one is held out, and which raw files they were made from if a manifest tells."""
    held_out = rows["val" if "val" in rows else "test"].pieces[0].day
    training = [piece.day for piece in rows["train"].pieces] if "train" in rows else []
    sources = _sources(held_out)
    halves = "first half val, second half test"
    if held_out.name == KAGGLE_DAY:
        whole = _show([held_out], sources)
        if not training:
            return f"Held out: the last seventh of {whole}, {halves}."
        return f"Training: the first six sevenths of {whole}. Held out: the last seventh, {halves}."
    start = f"Training: {_show(training, sources)}. " if training else ""
    return f"{start}Held out: {_show([held_out], sources)}, {halves}."


def _sources(day: Day) -> dict[str, str]:
    path = day.paths["labels"].with_name(MANIFEST_NAME)
    try:
        days = load_manifest(path)["days"] if path.exists() else {}
        return {str(name): str(facts["source"]) for name, facts in days.items() if "source" in facts}
    except (DatasetError, KeyError, TypeError, AttributeError):
        return {}


def _show(days: Sequence[Day], sources: Mapping[str, str]) -> str:
    names = list(dict.fromkeys((days[0].name, days[-1].name)))
    files = [sources[name] for name in names if name in sources]
    return " to ".join(names) + (f" ({' to '.join(files)})" if files else "")


def find_copies(rows: Mapping[Stage, DayRows]) -> Iterator[str]:
    """Yields a warning for each day that trains and has the same rows as the held-out day."""
    held_out = rows["val" if "val" in rows else "test"].pieces[0].day
    for piece in rows["train"].pieces:
        if piece.day is not held_out and _is_copy(piece.day, held_out):
            yield (
                f"WARNING: {held_out.name}, which is held out, has the rows of {piece.day.name}, which trains: its "
                "scores say nothing about new rows."
            )


def _is_copy(one: Day, other: Day) -> bool:
    if one.num_rows != other.num_rows or one.widths != other.widths:
        return False
    pairs = [(one.labels, other.labels), (one.dense, other.dense), *zip(one.ids, other.ids, strict=True)]
    spans = list(_spans(0, one.num_rows))
    if all(np.array_equal(a[span], b[span]) for a, b in pairs for span in spans):
        return any(len(np.unique(one.dense[span], axis=0)) > 1 for span in spans)  # not the same row again and again
    return False


def _spans(start: int, stop: int) -> Iterator[slice]:
    """A few ranges of rows, evenly spread from the first row to the last."""
    starts = np.linspace(start, max(start, stop - _SPAN_ROWS), _SPANS).astype(int)
    return (slice(first, min(first + _SPAN_ROWS, stop)) for first in np.unique(starts).tolist())


@dataclass(frozen=True)
class Folded:
    """How many ids of some rows are folded: they are not below their table's rows, so they are taken modulo these.

    Attributes:
        name: the rows' day or split.
        num_rows: rows that were looked at.
    """

    name: str
    num_rows: int
    shares_F: Shares


def measure_folded(name: str, pieces: Sequence[Piece], table_rows_F: npt.NDArray[np.int64]) -> Folded:
    """Measures the shares of folded ids in a sample of the rows of some pieces.

    Args:
        table_rows_F: rows of each feature's table.
    """
    shares, rows = np.zeros(len(table_rows_F)), 0
    for piece in pieces:
        for span in _spans(piece.start, piece.stop):
            arrays = [array[span] for array in piece.day.ids]
            columns = arrays if len(arrays) > 1 else np.split(arrays[0], len(table_rows_F), axis=1)
            shares += [(ids >= limit).mean(axis=1).sum() for ids, limit in zip(columns, table_rows_F, strict=True)]
            rows += len(arrays[0])
    return Folded(name, rows, shares / max(1, rows))


def measure_each_part(rows: Mapping[Stage, DayRows], table_rows_F: npt.NDArray[np.int64]) -> list[Folded]:
    """Measures each day that trains, the validation set and the test set."""
    parts = []
    for stage, split in rows.items():
        names = [(piece.day.name if stage == "train" else stage, piece) for piece in split.pieces]
        parts += [measure_folded(name, [piece], table_rows_F) for name, piece in names]
    return parts


def compare_folded(parts: Sequence[Folded]) -> str:
    """A warning if a feature's ids are folded in one part and not in another; empty if there is none."""
    parts = [part for part in parts if part.num_rows >= LEAST_ROWS]
    apart_F = np.zeros(len(CATEGORICAL_NAMES), bool)
    for one, other in combinations(parts, 2):
        apart_F |= abs(one.shares_F - other.shares_F) >= _APART
    if not apart_F.any():
        return ""
    shares = {part.name: float(part.shares_F[apart_F].mean()) for part in parts}
    middle = (max(shares.values()) + min(shares.values())) / 2
    high = {name: share for name, share in shares.items() if share > middle}
    low = {name: share for name, share in shares.items() if share <= middle}
    features = [name for name, is_apart in zip(CATEGORICAL_NAMES, apart_F, strict=True) if is_apart]
    more = f" and {len(features) - _SHOWN_FEATURES} more" if len(features) > _SHOWN_FEATURES else ""
    return (
        f"WARNING: ids that are not indices. Of {', '.join(features[:_SHOWN_FEATURES])}{more}, {_range(high)} of the "
        f"ids lie beyond their tables, and {_range(low)}. Such ids are taken modulo the tables' rows and get the rows "
        "of others: scores with them mean nothing. Encode all days with one vocabulary (dlrm preprocess --vocabulary)."
    )


def _range(shares: Mapping[str, float]) -> str:
    names, span = list(shares), sorted({f"{share:.0%}" for share in (min(shares.values()), max(shares.values()))})
    return f"{' to '.join(span)} in {', '.join(names) if len(names) < 4 else f'{names[0]}, ..., {names[-1]}'}"


def note_unknown_folding(parts: Sequence[Folded]) -> str:
    """A note if many ids are folded and it is not recorded whether those trained on were; empty if there is none."""
    share = max((float(part.shares_F.max()) for part in parts), default=0.0)
    if share < _APART:
        return ""
    return (
        f"Up to {share:.0%} of a feature's ids lie beyond its table and are taken modulo its rows. Whether that was so "
        "in training is not recorded: make sure that these ids are the model's indices."
    )
