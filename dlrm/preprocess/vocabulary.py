"""Ids to indices: counting, choosing and looking up, one column at a time, in bounded memory.

A 32-bit id is handled as its mixed value (`kernels.mix`), which spreads any set of ids evenly. If the ids of a column
don't fit into memory, there are several passes over the column: each deals with the ids whose mixed values begin with
the same bits, the pass's prefix. An entry is `mix(id) << 32 | value`. Shapes: R rows of a block.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from dlrm.errors import DatasetError, system_error_in
from dlrm.preprocess.kernels import count_ids, insert_slots, look_up_ids, mix_ids, unmix_ids
from dlrm.system.files import write_atomically

MISSING_INDEX = 0
RARE_INDEX = 1
FIRST_INDEX = 2
Order = Literal["frequency", "first_seen"]

_SMALLEST_TABLE = 1 << 12
_MOST_TAKEN = 0.6
_CHUNK_ENTRIES = 1 << 20
_BYTES_PER_KEPT_ID = 64
_VALUE = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Ids = npt.NDArray[np.uint32]
Entries = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
IdBlocks = Callable[[], Iterator[tuple[int, Ids]]]
"""Starts a pass over a column; yields the first row and the ids of each block."""


@dataclass(frozen=True)
class Counted:
    """Ids of a column with the same prefix: entries with counts, ascending, and the first row of each id."""

    entries: Entries
    first_rows: Rows


class TooManyIdsError(Exception):
    """A column needs several passes to fit into the memory that it was given, and may take only one."""


def count_column(blocks: IdBlocks, order: Order, memory_bytes: int, may_split: bool = True) -> Iterator[Counted]:
    """Counts every id but 0, in as few passes over the column as `memory_bytes` allows.

    Yields:
        Disjoint sets of ids, ascending by mixed value. `first_rows` is empty for the order "frequency".

    Raises:
        TooManyIdsError: if one pass is not enough and `may_split` is false.
    """
    # A slot, and a copy of it when the table grows or is sorted.
    bytes_per_slot = 16 if order == "frequency" else 32
    most_slots = max(_SMALLEST_TABLE, 1 << max(1, memory_bytes // bytes_per_slot).bit_length() - 1)
    # The range of mixed ids is split as needed, like a binary tree whose leaves are passes, from left to right:
    #   pass 1 begins with all ids; they are too many, so it keeps to 0..., and then to 00...
    #   pass 2 begins with 01..., pass 3 with 1..., which may be split again.
    prefix_bits = prefix = 0
    while prefix < 1 << prefix_bits:
        table = _CountTable(order, prefix_bits, prefix, most_slots)
        for first_row, ids_R in blocks():
            table.add(first_row, ids_R)
            if table.prefix_bits and not may_split:
                raise TooManyIdsError
        yield table.counted()
        prefix_bits, prefix = table.prefix_bits, table.prefix + 1
        while prefix_bits and prefix % 2 == 0:  # both halves are done: go up to what they are halves of
            prefix_bits, prefix = prefix_bits - 1, prefix // 2


class _CountTable:
    """Counts the ids whose mixed values begin with a prefix, which becomes longer if they are too many."""

    def __init__(self, order: Order, prefix_bits: int, prefix: int, most_slots: int) -> None:
        self.prefix_bits, self.prefix = prefix_bits, prefix
        self._has_rows = order == "first_seen"
        self._most_slots = most_slots
        self._make(_SMALLEST_TABLE, np.empty(0, np.uint64), np.empty(0, np.int64))

    def _make(self, size: int, entries: Entries, first_rows: Rows) -> None:
        self._slots: Entries = np.zeros(size, np.uint64)
        self._first_rows: Rows = np.zeros(size if self._has_rows else 0, np.int64)
        self._used = len(entries)
        insert_slots(entries, first_rows, self._slots, self._first_rows, self.prefix_bits)

    def _taken(self) -> tuple[Entries, Rows]:
        if self._has_rows:
            places = np.flatnonzero(self._slots)
            return self._slots[places], self._first_rows[places]
        return self._slots[self._slots != 0], self._first_rows

    def add(self, first_row: int, ids_R: Ids) -> None:
        """Counts a block of ids."""
        at = 0
        while at < len(ids_R):
            done, self._used = count_ids(
                ids_R[at:],
                first_row + at,
                self._slots,
                self._first_rows,
                self._used,
                int(_MOST_TAKEN * len(self._slots)),
                self.prefix_bits,
                self.prefix,
            )
            at += done
            if at < len(ids_R):
                self._make_room()

    def _make_room(self) -> None:
        size = 2 * len(self._slots)
        entries, first_rows = self._taken()
        if size > self._most_slots:
            # Full: leave the upper half of the range to a later pass. The counts of the lower half stay valid.
            size //= 2
            self.prefix_bits, self.prefix = self.prefix_bits + 1, 2 * self.prefix
            lower = (entries >> np.uint64(64 - self.prefix_bits)) == self.prefix
            entries = entries[lower]
            first_rows = first_rows[lower] if self._has_rows else first_rows
        # Free the old table before the new one is made.
        self._slots, self._first_rows = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._make(size, entries, first_rows)

    def counted(self) -> Counted:
        entries, first_rows = self._taken()
        if self._has_rows:
            order = np.argsort(entries)
            return Counted(entries[order], first_rows[order])
        entries.sort()
        return Counted(entries, first_rows)


@dataclass(frozen=True)
class Choice:
    """How many ids of a column were seen, and how many were given an index.

    Attributes:
        distinct: ids that were seen.
        kept: ids with an index of their own.
    """

    distinct: int
    kept: int


def choose_by_frequency(counts: Path, threshold: int, folder: Path, column: str) -> Choice:
    """Gives the ids seen `threshold` times or more the indices from 2 on, the most frequent first.

    Args:
        counts: file of entries with counts, ascending by mixed id; ids of equal frequency keep this order.
        folder: takes Parquet files with columns id, index, count.
    """
    # A counting sort that never holds all entries. First pass: how many ids have each frequency, so where the indices
    # of each frequency start. Second pass: each entry gets the next free index of its frequency.
    histogram: dict[int, int] = {}
    distinct = 0
    for entries in read_entries(counts):
        distinct += len(entries)
        values, sizes = np.unique(entries & _VALUE, return_counts=True)
        for value, size in zip(values.tolist(), sizes.tolist(), strict=True):
            if value >= threshold:
                histogram[value] = histogram.get(value, 0) + size
    starts, index = {}, FIRST_INDEX
    for value in sorted(histogram, reverse=True):
        starts[value], index = index, index + histogram[value]
    part = 0
    for entries in read_entries(counts):
        entries = entries[(entries & _VALUE) >= threshold]
        if len(entries) == 0:
            continue
        values, group, sizes = np.unique(entries & _VALUE, return_inverse=True, return_counts=True)
        by_group = np.argsort(group, kind="stable")
        within = np.empty(len(entries), np.int64)
        within[by_group] = np.arange(len(entries)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        indices = np.array([starts[value] for value in values.tolist()], np.int64)[group] + within
        for value, size in zip(values.tolist(), sizes.tolist(), strict=True):
            starts[value] += size
        _write_vocabulary(folder / f"{column}.{part:04d}.parquet", entries, indices)
        part += 1
    return Choice(distinct, index - FIRST_INDEX)


def choose_by_first_row(
    counts: Path, first_rows: Path, threshold: int, folder: Path, column: str, num_rows: int, memory_bytes: int
) -> Choice:
    """Gives the ids seen `threshold` times or more the indices from 2 on, in the order in which they came first.

    Args:
        counts: file of entries with counts.
        first_rows: file with the row in which each of these ids came first.
        num_rows: rows of the column.
    """
    distinct = counts.stat().st_size // 8
    index = FIRST_INDEX
    for part, (low, high) in enumerate(_row_ranges(counts, first_rows, threshold, num_rows, memory_bytes)):
        chosen, rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for entries, rows_of_entries in _read_pairs(counts, first_rows):
            here = (rows_of_entries >= low) & (rows_of_entries < high) & ((entries & _VALUE) >= threshold)
            chosen.append(entries[here])
            rows.append(rows_of_entries[here])
        order = np.argsort(np.concatenate(rows))
        entries = np.concatenate(chosen)[order]
        for start in range(0, len(entries), _CHUNK_ENTRIES):
            some = entries[start : start + _CHUNK_ENTRIES]
            path = folder / f"{column}.{part:04d}.{start // _CHUNK_ENTRIES:04d}.parquet"
            _write_vocabulary(path, some, np.arange(index, index + len(some)))
            index += len(some)
    return Choice(distinct, index - FIRST_INDEX)


def _row_ranges(
    counts: Path, first_rows: Path, threshold: int, num_rows: int, memory_bytes: int
) -> list[tuple[int, int]]:
    """Ranges of rows, each with about as many ids that are kept and come first there as fit into `memory_bytes`."""
    bins = min(num_rows, 1 << 16)
    edges = num_rows * np.arange(bins + 1) // bins
    sizes = np.zeros(bins, np.int64)
    for entries, rows in _read_pairs(counts, first_rows):
        kept = rows[(entries & _VALUE) >= threshold]
        sizes += np.bincount(np.searchsorted(edges, kept, "right") - 1, minlength=bins)
    group = np.cumsum(sizes) // max(1, memory_bytes // _BYTES_PER_KEPT_ID)
    starts = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), bins]
    return [(int(edges[low]), int(edges[high])) for low, high in pairwise(starts)]


def _read_pairs(counts: Path, first_rows: Path) -> Iterator[tuple[Entries, Rows]]:
    with first_rows.open("rb") as file:
        for entries in read_entries(counts):
            yield entries, np.fromfile(file, np.int64, len(entries))


def read_entries(path: Path) -> Iterator[Entries]:
    """Yields the entries of a file, a million at a time."""
    with path.open("rb") as file:
        while len(entries := np.fromfile(file, np.uint64, _CHUNK_ENTRIES)):
            yield entries


def _write_vocabulary(path: Path, entries: Entries, indices: npt.NDArray[np.int64]) -> None:
    mixed = (entries >> _SHIFT).astype(np.uint32)
    ids = np.empty_like(mixed)
    unmix_ids(mixed, ids)
    counts = (entries & _VALUE).astype(np.uint32)
    frame = pl.DataFrame({"id": ids, "index": indices.astype(np.int32), "count": counts}).sort("index")

    def write(file: BinaryIO) -> None:
        try:
            frame.write_parquet(file)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise system_error_in(error) or error from None

    write_atomically(path, write)


def vocabulary_files(folder: Path, column: str) -> list[Path]:
    """The Parquet files of a column, in order. There is none if no id is kept."""
    return sorted(folder.glob(f"{column}.*.parquet"))


def load_entries(
    files: Sequence[Path], max_embeddings: int | None, prefix_bits: int = 0, prefix: int = 0
) -> Iterator[Entries]:
    """Yields entries with indices, for the ids with a prefix. Indices are reduced modulo `max_embeddings`.

    Raises:
        DatasetError: if a file is not a vocabulary.
    """
    columns = [pl.col("id").cast(pl.UInt32), pl.col("index").cast(pl.Int32)]
    for path in files:
        rows = count_rows(path)
        for start in range(0, rows, _CHUNK_ENTRIES):
            with _reading(path) as name:
                frame = pl.scan_parquet(name).select(columns).slice(start, _CHUNK_ENTRIES).collect()
                if frame["id"].null_count() or frame["index"].null_count() or frame["index"].min() < FIRST_INDEX:  # type: ignore[operator]
                    raise ValueError("a missing value, or an index below 2")
            ids, indices = frame["id"].to_numpy(), frame["index"].to_numpy().astype(np.uint64)
            if max_embeddings is not None:
                indices = indices % np.uint64(max_embeddings)
            mixed = np.empty_like(ids)
            mix_ids(ids, mixed)
            entries = (mixed.astype(np.uint64) << _SHIFT) | indices
            if prefix_bits:
                entries = entries[(entries >> np.uint64(64 - prefix_bits)) == prefix]
            yield entries


def count_rows(path: Path) -> int:
    """Ids in a vocabulary file.

    Raises:
        DatasetError: if it is not one.
    """
    with _reading(path) as name:
        return pl.scan_parquet(name).select(pl.len()).collect().item()


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """A name of the file for polars, which can't open names that are not UTF-8. Turns its errors into DatasetError."""
    try:
        with path.open("rb") as file:
            is_utf8 = os.fsencode(path).decode(errors="replace") == str(path)
            yield path if is_utf8 else Path(f"/proc/self/fd/{file.fileno()}")
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{path}: not a vocabulary ({text}). Expected columns id, index, as `dlrm preprocess` writes them."
        ) from None


class LookupTable:
    """The indices of a column's ids, as far as the ids begin with a prefix and have an index."""

    def __init__(self, files: Sequence[Path], max_embeddings: int | None, prefix_bits: int, prefix: int) -> None:
        parts = list(load_entries(files, max_embeddings, prefix_bits, prefix))
        size = _SMALLEST_TABLE
        while size * _MOST_TAKEN < sum(map(len, parts)):
            size *= 2
        self._prefix_bits, self._prefix = prefix_bits, prefix
        self._slots = np.zeros(size, np.uint64)
        self.missing_index = MISSING_INDEX
        nothing = np.empty(0, np.int64)
        for entries in parts:
            # A missing id is read as 0. Only the order "first_seen" gives id 0 an entry.
            own = entries[(entries >> _SHIFT) == 0]
            if len(own):
                self.missing_index = int(own[0] & _VALUE)
            insert_slots(entries[(entries >> _SHIFT) != 0], nothing, self._slots, nothing, prefix_bits)

    def look_up(self, ids_R: Ids, indices_R: npt.NDArray[np.int32]) -> None:
        """Writes the indices of the ids that are in the table, and leaves the others as they are."""
        look_up_ids(ids_R, self._slots, self._prefix_bits, self._prefix, indices_R)


def lookup_tables(
    files: Sequence[Path], max_embeddings: int | None, memory_bytes: int, may_split: bool = True
) -> Iterator[LookupTable]:
    """Yields tables of disjoint ids that together hold the whole vocabulary, each within `memory_bytes`.

    Raises:
        TooManyIdsError: if one table is not enough and `may_split` is false.
    """
    kept = sum(count_rows(path) for path in files)
    # 48 bytes an id: an entry, a copy of it, and up to 2 * 8 / 0.6 bytes of slots.
    prefix_bits = max(0, (kept * 48 // memory_bytes).bit_length())
    if prefix_bits and not may_split:
        raise TooManyIdsError
    for prefix in range(1 << prefix_bits):
        yield LookupTable(files, max_embeddings, prefix_bits, prefix)
