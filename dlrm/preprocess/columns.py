"""Parsed rows by column: made from lines of text, written and read, and what keeps a line from being a row.

Shapes: R rows of a block, I integer features, F categorical features.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm.preprocess.kernels import MAX_ID_DIGITS, parse_rows
from dlrm.preprocess.raw import TextBlock
from dlrm.schema.criteo import (
    CATEGORICAL_NAMES,
    INTEGER_NAMES,
    NUM_CATEGORICAL_FEATURES,
    NUM_COLUMNS,
    NUM_INTEGER_FEATURES,
)
from dlrm.system.console import plural
from dlrm.system.files import naming, write_array

MIN_ROW_BYTES = NUM_COLUMNS - 1  # 38 tabs and a newline, with every column empty, and no label
PARSED_BYTES_PER_ROW = 4 * NUM_CATEGORICAL_FEATURES + 4 * NUM_INTEGER_FEATURES + 2 + 1
_INTEGERS_OFFSET = 4 * NUM_CATEGORICAL_FEATURES
_MISSING_OFFSET = _INTEGERS_OFFSET + 4 * NUM_INTEGER_FEATURES
_LABELS_OFFSET = _MISSING_OFFSET + 2
_LABELS_SOUGHT_BYTES = 64 << 10
_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True)
class RejectedLine:
    """A line that is not a row: its number within the block, from 0, and its bytes without the newline."""

    line: int
    text: bytes


@dataclass(frozen=True)
class Columns:
    """Parsed rows, by column. A missing integer or id is 0; bit i of `missing_R` says that integer i is missing."""

    labels_R: npt.NDArray[np.uint8]
    integers_IR: npt.NDArray[np.int32]
    ids_FR: npt.NDArray[np.uint32]
    missing_R: npt.NDArray[np.uint16]
    rejected: Sequence[RejectedLine]

    @property
    def num_rows(self) -> int:
        """Rows of the block."""
        return len(self.labels_R)


class _Buffers(threading.local):
    """Arrays that a thread uses again for each block, so that the operating system need not clear fresh pages."""

    def __init__(self) -> None:
        self.rows = 0

    def reserve(self, rows: int) -> None:
        if rows > self.rows:
            self.rows = rows
            self.labels = np.empty(rows, np.uint8)
            self.integers = np.empty((NUM_INTEGER_FEATURES, rows), np.int32)
            self.ids = np.empty((NUM_CATEGORICAL_FEATURES, rows), np.uint32)
            self.missing = np.empty(rows, np.uint16)


_buffers = _Buffers()


def parse_block(block: TextBlock, max_rejected: int, has_labels: bool = True) -> Columns:
    """Parses a block. The returned arrays are overwritten by the thread's next call.

    Args:
        max_rejected: parsing ends after this number of lines that are not rows.
        has_labels: whether the rows begin with a label.
    """
    _buffers.reserve(block.size // MIN_ROW_BYTES + 1)  # only the part that rows fill takes memory
    spans = np.empty((max_rejected, 3), np.int64)
    rows, num_rejected = parse_rows(
        block.text,
        block.size,
        _buffers.labels,
        _buffers.integers,
        _buffers.ids,
        _buffers.missing,
        spans,
        has_labels,
    )
    rejected = [
        RejectedLine(line, block.text[start:stop].tobytes()) for line, start, stop in spans[:num_rejected].tolist()
    ]
    return Columns(
        _buffers.labels[:rows],
        _buffers.integers[:, :rows],
        _buffers.ids[:, :rows],
        _buffers.missing[:rows],
        rejected,
    )


def write_columns(path: Path, columns: Columns) -> None:
    """Writes ids, integers, bits of missing integers, and labels, column after column."""
    with naming(path), path.open("wb") as file:
        for part in (*columns.ids_FR, *columns.integers_IR, columns.missing_R, columns.labels_R):
            write_array(file, part)


def write_rejected(path: Path, rejected: Sequence[RejectedLine]) -> None:
    """Writes lines with their numbers."""
    with naming(path), path.open("wb") as file:
        file.writelines(b"%d\t%s\n" % (line.line, line.text) for line in rejected)


def read_rejected(path: Path) -> Iterator[RejectedLine]:
    """What `write_rejected` wrote."""
    with path.open("rb") as file:
        for line in file:
            number, text = line.removesuffix(b"\n").split(b"\t", 1)
            yield RejectedLine(int(number), text)


def read_ids(path: Path, column: int, rows: int) -> npt.NDArray[np.uint32]:
    """One categorical column of a block of `rows` rows."""
    return np.fromfile(path, np.uint32, rows, offset=4 * column * rows)


def read_integers(path: Path, rows: int) -> npt.NDArray[np.int32]:
    """The integers [I, R] of a block of `rows` rows."""
    flat = np.fromfile(path, np.int32, NUM_INTEGER_FEATURES * rows, offset=_INTEGERS_OFFSET * rows)
    return flat.reshape(NUM_INTEGER_FEATURES, rows)


def read_missing(path: Path, rows: int) -> npt.NDArray[np.bool_]:
    """Which integers [I, R] of a block of `rows` rows are missing."""
    missing_R = np.fromfile(path, np.uint16, rows, offset=_MISSING_OFFSET * rows)
    return (missing_R >> np.arange(NUM_INTEGER_FEATURES, dtype=np.uint16)[:, None]) & 1 == 1


def read_labels(path: Path, rows: int) -> npt.NDArray[np.uint8]:
    """The labels of a block of `rows` rows; NO_LABEL for all if they have none."""
    return np.fromfile(path, np.uint8, rows, offset=_LABELS_OFFSET * rows)


def has_labels(block: TextBlock) -> bool:
    """Whether the rows have labels, judged by the number of columns of most of the first lines."""
    lines = block.text[: min(block.size, _LABELS_SOUGHT_BYTES)].tobytes().split(b"\n")
    columns = [line.count(b"\t") + 1 for line in lines]
    return columns.count(NUM_COLUMNS - 1) <= columns.count(NUM_COLUMNS)


def explain(text: bytes, has_labels: bool = True) -> str | None:
    """What keeps a line from being a row, columns counted from 1; None if it is one. Plain twin of `parse_rows`."""
    fields = text.removesuffix(b"\r").split(b"\t")
    if len(fields) != NUM_COLUMNS - (not has_labels):
        return _explain_columns(len(fields), has_labels)
    if not has_labels:
        fields.insert(0, b"0")
    first = 2 if has_labels else 1
    label, integers, ids = fields[0], fields[1 : 1 + NUM_INTEGER_FEATURES], fields[1 + NUM_INTEGER_FEATURES :]
    if label not in (b"0", b"1"):
        return f"column 1 (label): {_show(label)}, expected 0 or 1"
    for i, field in enumerate(integers):
        if field and not (re.fullmatch(rb"-?[0-9]{1,11}", field) and int(field) in _INT32):
            return (
                f"column {first + i} ({INTEGER_NAMES[i]}): {_show(field)}, expected an integer of 32 bits, or nothing"
            )
    for i, field in enumerate(ids):
        if field and not re.fullmatch(rb"[0-9a-fA-F]{1,%d}" % MAX_ID_DIGITS, field):
            where = f"column {first + NUM_INTEGER_FEATURES + i} ({CATEGORICAL_NAMES[i]})"
            return f"{where}: {_show(field)}, expected at most {MAX_ID_DIGITS} hexadecimal digits, or nothing"
    return None


def _explain_columns(found: int, has_labels: bool) -> str:
    if has_labels:
        hint = "; a line without its label belongs into a file of such lines" if found == NUM_COLUMNS - 1 else ""
        expected = f"expected {NUM_COLUMNS}: label, 13 integers, 26 hexadecimal ids, tab separated{hint}"
    else:
        hint = "; a line with a label belongs into a file of such lines" if found == NUM_COLUMNS else ""
        expected = f"expected {NUM_COLUMNS - 1} as in the other lines: no label, 13 integers, 26 hexadecimal ids{hint}"
    return f"{plural(found, 'column')}, {expected}"


def _show(field: bytes) -> str:
    return repr(field[:40].decode("utf-8", errors="backslashreplace")) + ("..." if len(field) > 40 else "")
