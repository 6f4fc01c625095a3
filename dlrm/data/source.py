"""Where a split's rows come from: generated, in this rank's memory, or on disk."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dlrm.console import Progress
from dlrm.data.batch import Rows
from dlrm.data.binary_days import DayRows
from dlrm.data.partition import Partition, Span
from dlrm.data.random_source import RandomSource
from dlrm.schema import NUM_CATEGORICAL_FEATURES, NUM_INTEGER_FEATURES

_CHUNK_ROWS = 1 << 16
BYTES_PER_ROW = 4 * (NUM_INTEGER_FEATURES + NUM_CATEGORICAL_FEATURES + 1)
"""What a row takes in memory."""


class Source(Protocol):
    """Gives the rows of a span in an epoch."""

    def read(self, span: Span, epoch: int) -> Rows:
        """Rows [span.start, span.stop), ids already inside their tables."""
        ...


@dataclass(frozen=True)
class RandomSplit:
    """Random rows; every epoch goes on where the last one ended."""

    source: RandomSource
    rows_per_epoch: int

    def read(self, span: Span, epoch: int) -> Rows:
        """See `Source`."""
        first = epoch * self.rows_per_epoch
        return self.source.read(first + span.start, first + span.stop)


@dataclass(frozen=True)
class MappedSplit:
    """Rows read from disk as they are needed."""

    rows: DayRows
    table_rows: npt.NDArray[np.int64]

    def read(self, span: Span, epoch: int) -> Rows:
        """See `Source`.

        Raises:
            DatasetError: at a value out of range.
        """
        del epoch
        return fold_ids(self.rows.read(span.start, span.stop), self.table_rows)


@dataclass(frozen=True)
class MemorySplit:
    """This rank's own rows, and no others, in memory."""

    rows: Rows
    batch_size: int

    def read(self, span: Span, epoch: int) -> Rows:
        """See `Source`."""
        del epoch
        own = slice(span.step * self.batch_size, span.step * self.batch_size + span.rows)
        return Rows(self.rows.dense_BI[own], self.rows.ids_BN[own], self.rows.labels_B[own])


def load_split(
    rows: DayRows, partition: Partition, rank: int, table_rows: npt.NDArray[np.int64], label: str
) -> MemorySplit:
    """Reads and checks this rank's rows of a split.

    Args:
        label: what is loaded, for those who watch; empty to show nothing.

    Raises:
        DatasetError: at a value out of range.
    """
    own_rows = sum(span.rows for span in partition.spans(rank))
    dense_BI = np.empty((own_rows, NUM_INTEGER_FEATURES), np.float32)
    ids_BF = np.empty((own_rows, NUM_CATEGORICAL_FEATURES), np.int32)
    labels_B = np.empty(own_rows, np.int32)
    progress = Progress(f"Loading {label}", own_rows, "rows", shown=bool(label))
    done = 0
    for start, stop in _ranges(partition, rank):
        part = fold_ids(rows.read(start, stop), table_rows)
        own = slice(done, done + stop - start)
        dense_BI[own], ids_BF[own], labels_B[own] = part.dense_BI, part.ids_BN, part.labels_B
        done += stop - start
        progress.advance(stop - start)
    progress.close()
    return MemorySplit(Rows(dense_BI, ids_BF, labels_B), partition.batch_size)


def _ranges(partition: Partition, rank: int) -> list[tuple[int, int]]:
    """This rank's rows as few ranges of bounded size, in order."""
    ranges: list[tuple[int, int]] = []
    for span in partition.spans(rank):
        if ranges and ranges[-1][1] == span.start and span.stop - ranges[-1][0] <= _CHUNK_ROWS:
            ranges[-1] = (ranges[-1][0], span.stop)
        else:
            ranges.append((span.start, span.stop))
    return ranges


def fold_ids(rows: Rows, table_rows: npt.NDArray[np.int64]) -> Rows:
    """Reduces ids modulo the rows of their tables, to int32."""
    if rows.ids_BN.dtype == np.int32 and (rows.ids_BN < table_rows).all():
        return rows
    return Rows(rows.dense_BI, (rows.ids_BN % table_rows).astype(np.int32), rows.labels_B)
