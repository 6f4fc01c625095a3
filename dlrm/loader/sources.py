"""Where a split's rows come from: generated, this rank's memory, or disk.

Shapes: B rows of a span, N rows of several.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dlrm.dataset.rows import Rows
from dlrm.loader.expansion import Companions
from dlrm.loader.partition import Partition, Span
from dlrm.loader.permutation import Permutation
from dlrm.loader.random_rows import RandomRows
from dlrm.ranks.runtime import derive_seed
from dlrm.schema.criteo import NUM_INTEGER_FEATURES
from dlrm.system.console import Progress

_CHUNK_ROWS = 1 << 16


class RowSet(Protocol):
    """Rows on disk, by their numbers: all rows of a split, or those that were kept."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        ...

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each array of ids, as `Rows.ids` has them."""
        ...

    def read(self, start: int, stop: int) -> Rows:
        """Copies rows [start, stop), checked."""
        ...

    def take(self, rows_B: npt.NDArray[np.int64]) -> Rows:
        """Copies rows, given in ascending order, checked."""
        ...


def bytes_per_row(widths: tuple[int, ...]) -> int:
    """Memory of a row in bytes.

    Args:
        widths: columns of each array of ids.
    """
    return 4 * (NUM_INTEGER_FEATURES + sum(widths) + 1)


class Source(Protocol):
    """Gives the rows of spans of an epoch."""

    def read(self, spans: Sequence[Span], epoch: int) -> Iterator[Rows]:
        """Yields rows [start, stop) of each span, read on request. Ids are inside their tables."""
        ...


@dataclass(frozen=True)
class RandomSource:
    """Random rows. Each epoch continues where the one before ended."""

    source: RandomRows
    rows_per_epoch: int

    def read(self, spans: Sequence[Span], epoch: int) -> Iterator[Rows]:
        """See `Source`."""
        first = epoch * self.rows_per_epoch
        return (self.source.read(first + span.start, first + span.stop) for span in spans)


@dataclass(frozen=True)
class MappedSource:
    """Rows read from disk as they are needed."""

    rows: RowSet
    table_rows: npt.NDArray[np.int64]

    def read(self, spans: Sequence[Span], epoch: int) -> Iterator[Rows]:
        """See `Source`.

        Raises:
            DatasetError: at a value out of range.
        """
        del epoch
        return (fold_ids(self.rows.read(span.start, span.stop), self.table_rows) for span in spans)


@dataclass(frozen=True)
class ShuffledSource:
    """Rows gathered from disk, in another order every epoch: position i holds row `Permutation.at(i)`.

    A step's rows do not depend on the number of ranks. Within a batch, rows are in the order of the files.
    """

    rows: RowSet
    table_rows: npt.NDArray[np.int64]
    seed: int

    def read(self, spans: Sequence[Span], epoch: int) -> Iterator[Rows]:
        """See `Source`. The places of all spans are computed in one go, since each numpy call has a price.

        Raises:
            DatasetError: at a value out of range.
        """
        permutation = Permutation(self.rows.num_rows, derive_seed(self.seed, "shuffle_training_set", epoch))
        rows_N = permutation.at(np.concatenate([np.arange(span.start, span.stop) for span in spans]))
        ends = np.cumsum([span.rows for span in spans])
        for rows_B in np.split(rows_N, ends[:-1]):
            rows_B.sort()
            yield fold_ids(self.rows.take(rows_B), self.table_rows)


@dataclass(frozen=True)
class ExpandedSource:
    """Adds companions to the ids of a source that has one id per feature."""

    source: Source
    companions: Companions

    def read(self, spans: Sequence[Span], epoch: int) -> Iterator[Rows]:
        """See `Source`."""
        for rows in self.source.read(spans, epoch):
            yield Rows(rows.dense_BI, self.companions.expand(rows.ids[0]), rows.labels_B)


@dataclass(frozen=True)
class MemorySource:
    """This rank's own rows in memory, and no others."""

    rows: Rows
    batch_size: int

    def read(self, spans: Sequence[Span], epoch: int) -> Iterator[Rows]:
        """See `Source`."""
        del epoch
        starts = (span.step * self.batch_size for span in spans)
        return (self.rows.take(slice(start, start + span.rows)) for start, span in zip(starts, spans, strict=True))


def load_rows(
    rows: RowSet, partition: Partition, rank: int, table_rows: npt.NDArray[np.int64], label: str
) -> MemorySource:
    """Loads this rank's rows of a split into memory, checked.

    Args:
        table_rows: rows of each feature's table; ids are reduced modulo these.
        label: of the progress bar; empty for no bar.

    Raises:
        DatasetError: at a value out of range.
    """
    own_rows = sum(span.rows for span in partition.spans(rank))
    loaded = Rows.empty(own_rows, rows.widths)
    progress = Progress(f"Loading {label}", own_rows, "rows", shown=bool(label))
    done = 0
    for start, stop in _ranges(partition, rank):
        part = fold_ids(rows.read(start, stop), table_rows)
        own = slice(done, done + stop - start)
        loaded.dense_BI[own], loaded.labels_B[own] = part.dense_BI, part.labels_B
        for ids, ids_of_part in zip(loaded.ids, part.ids, strict=True):
            ids[own] = ids_of_part
        done += stop - start
        progress.advance(stop - start)
    progress.close()
    return MemorySource(loaded, partition.batch_size)


def check_rows(rows: RowSet, partition: Partition, rank: int, label: str) -> None:
    """Reads this rank's rows of a split that stays on disk, so that a wrong value is found before training begins.

    Args:
        label: of the progress bar; empty for no bar.

    Raises:
        DatasetError: at a value out of range.
    """
    ranges = _ranges(partition, rank)
    progress = Progress(f"Checking {label}", sum(stop - start for start, stop in ranges), "rows", shown=bool(label))
    for start, stop in ranges:
        rows.read(start, stop)
        progress.advance(stop - start)
    progress.close()


def _ranges(partition: Partition, rank: int) -> list[tuple[int, int]]:
    """This rank's rows, in order, as few ranges of bounded size."""
    ranges: list[tuple[int, int]] = []
    for span in partition.spans(rank):
        if ranges and ranges[-1][1] == span.start and span.stop - ranges[-1][0] <= _CHUNK_ROWS:
            ranges[-1] = (ranges[-1][0], span.stop)
        else:
            ranges.append((span.start, span.stop))
    return ranges


def fold_ids(rows: Rows, table_rows: npt.NDArray[np.int64]) -> Rows:
    """Reduces ids modulo the rows of their tables, to int32.

    Args:
        table_rows: rows of each feature's table.
    """
    limits = [table_rows] if len(rows.ids) == 1 else table_rows
    ids = tuple(_fold(array, limit) for array, limit in zip(rows.ids, limits, strict=True))
    return Rows(rows.dense_BI, ids, rows.labels_B)


def _fold(ids: npt.NDArray[np.integer], table_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
    if ids.dtype == np.int32 and (ids.max(axis=0, initial=0) < table_rows).all():
        return ids
    return (ids % table_rows).astype(np.int32)
