"""A split of a run: an iterable of this rank's batches, built ahead of need."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
from torch._C._profiler import _RecordFunctionFast

from dlrm.dataset.binary_days import DayRows
from dlrm.dataset.rows import Rows
from dlrm.loader.batch import Batch, build_batch
from dlrm.loader.frequencies import IdFrequencies
from dlrm.loader.partition import Partition, Span
from dlrm.loader.prefetch import prefetch
from dlrm.loader.sources import Source
from dlrm.ranks.runtime import derive_seed

_BATCHES_AHEAD = 4
_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Split:
    """One split as this rank sees it.

    Attributes:
        source: gives the rows of spans.
        partition: says which rows each rank takes at each step.
        hotness: ids per sample of each feature.
        shuffle_seed: seed for shuffling the rows within each batch; None to leave them in order.
        pin_memory: whether batches lie in page-locked memory.
        num_cached_batches: number of batches to build once and cycle through; None to build every batch.
        frequencies: counts the ids of the batches that are trained on; None if nothing is counted.
        rows: all rows of the split on disk, before any are left out; None for random data.
        mapped: gives any rows, if `source` has only those of a pass from the start; None if `source` gives any.
        batches_ahead: finished batches that a thread keeps ready for the consumer; 0 builds each batch on request.
    """

    source: Source
    partition: Partition
    rank: int
    hotness: tuple[int, ...]
    shuffle_seed: int | None = None
    pin_memory: bool = False
    num_cached_batches: int | None = None
    frequencies: IdFrequencies | None = None
    rows: DayRows | None = None
    mapped: Source | None = None
    batches_ahead: int = _BATCHES_AHEAD

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """This rank's batches of one pass."""
        built = self._build(epoch)
        return prefetch(built, self.batches_ahead) if self.batches_ahead else built

    def resumed(self, row: int, step: int) -> "Split":
        """The rest of a pass whose first `row` rows were taken in `step` steps, by any number of ranks."""
        if (partition := self.partition.resumed(row, step)) == self.partition:
            return self
        source = self.source if partition.is_regular or self.mapped is None else self.mapped
        return replace(self, partition=partition, source=source)

    def _build(self, epoch: int) -> Iterator[Batch]:
        if self.num_cached_batches is None:
            yield from self._build_batches(self.partition.spans(self.rank), epoch)
            return
        steps = self.partition.num_steps
        for step in range(epoch * steps + self.partition.first_step, (epoch + 1) * steps):
            yield self._cached_batches[step % len(self._cached_batches)]

    @cached_property
    def _cached_batches(self) -> list[Batch]:
        spans = self.partition.resumed(0, 0).spans(self.rank)
        return list(self._build_batches(islice(spans, self.num_cached_batches), epoch=0))

    def _build_batches(self, spans: Iterator[Span], epoch: int) -> Iterator[Batch]:
        # Small spans are read in groups: a shuffled source computes the places of a whole group in one numpy call.
        spans_at_once = max(1, _ROWS_AT_ONCE // self.partition.batch_size)
        while group := tuple(islice(spans, spans_at_once)):
            read = self.source.read(group, epoch)
            for span in group:
                with _RecordFunctionFast("## build_batch ##"):  # costs next to nothing without a profiler
                    batch = self._build_batch(next(read), span, epoch)
                yield batch

    def _build_batch(self, rows: Rows, span: Span, epoch: int) -> Batch:
        if self.shuffle_seed is not None:
            seed = derive_seed(self.shuffle_seed, "shuffle_batches", self.rank, epoch, span.step)
            rows = rows.take(np.random.default_rng(seed).permutation(span.rows))
        return build_batch(rows, span, self.hotness, pinned=self.pin_memory)
