"""What the stages of a preprocessing run share."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from dlrm.dataset.name_order import source_names
from dlrm.preprocess.config import PreprocessConfig, Resources
from dlrm.preprocess.layout import Block
from dlrm.preprocess.ranks import Ranks
from dlrm.preprocess.vocabulary import TooManyIdsError
from dlrm.preprocess.workspace import Workspace
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_CATEGORICAL_FEATURES
from dlrm.system.console import Progress
from dlrm.system.threads import in_order

T = TypeVar("T")
R = TypeVar("R")

Finished = tuple[dict[str, Any], list[Path]]
"""What to record of a finished part, and the files that must reach the disk before that."""


@dataclass(frozen=True)
class Run:
    """A preprocessing run on this rank.

    Attributes:
        raw: raw files, one for each day.
        names: names of the days.
        has_labels: whether the rows have labels; if not, all of them are held out.
        seconds: time of each finished stage, by its label.
    """

    config: PreprocessConfig
    raw: Sequence[Path]
    names: tuple[str, ...]
    workspace: Workspace
    resources: Resources
    ranks: Ranks
    pool: ThreadPoolExecutor
    has_labels: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def sources(self) -> list[str]:
        """Names of the raw files in the manifest."""
        return source_names(self.raw)

    @contextmanager
    def stage(self, label: str, unit: str, total: int) -> Iterator[Progress]:
        """Shows and times a stage. At its end the ranks wait for each other. Collective."""
        started = time.monotonic()
        progress = Progress(label, total // self.ranks.world_size, unit, shown=self.ranks.is_main)
        yield progress
        progress.close()
        self.meet()
        self.seconds[label] = time.monotonic() - started

    def meet(self) -> None:
        """Waits for the other ranks. Each then sees what the others have recorded. Collective."""
        if self.ranks.world_size > 1:
            self.workspace.flush()
            self.ranks.barrier()

    def in_order(
        self, items: Iterable[T], function: Callable[[T], R], ahead: int | None = None
    ) -> Iterator[tuple[T, R]]:
        """Results of `function` on the run's threads, in the order of `items`."""
        return in_order(self.pool, items, function, self.resources.workers if ahead is None else ahead)

    def each_column(self, stage: str, do: Callable[[int, int, bool], Finished]) -> None:
        """Runs a stage on those of this rank's columns that are not finished yet.

        Columns that do not fit into one worker's share of the memory come last, one at a time, with all the memory.

        Args:
            do: called with a column, bytes of memory, and whether it may take several passes over the column. It raises
                TooManyIdsError if it may not, and one is not enough.
        """

        def one(column: int, memory: int, may_split: bool) -> bool:
            if self.workspace.facts(stage, CATEGORICAL_NAMES[column]) is None:
                try:
                    facts, files = do(column, memory, may_split)
                except TooManyIdsError:
                    return False
                self.workspace.finish(stage, CATEGORICAL_NAMES[column], facts, files)
            return True

        share = self.ranks.share(range(NUM_CATEGORICAL_FEATURES))
        memory = self.resources.bytes_per_worker
        large = [column for column, fits in self.in_order(share, lambda c: one(c, memory, False)) if not fits]
        for column in large:
            one(column, memory * self.resources.workers, True)

    def recorded(self, stage: str, part: str) -> dict[str, Any]:
        """What was recorded about a part, which must be finished."""
        facts = self.workspace.facts(stage, part)
        assert facts is not None, (stage, part)
        return facts

    def parsed_blocks(self, day: int) -> Iterator[dict[str, Any]]:
        """What was recorded about each block of a day."""
        for number in range(self.recorded("parse", self.names[day])["blocks"]):
            yield self.recorded("parse", f"{self.names[day]}.{number:06d}")

    def parsed_path(self, block: Block) -> Path:
        """File with the columns of a block."""
        return self.workspace.root / "parsed" / self.names[block.day] / f"{block.number:06d}"

    def encoded_path(self, day: int, column: str) -> Path:
        """File with the indices of a column of a day, int32 [rows]."""
        return self.workspace.root / "encoded" / self.names[day] / column

    @property
    def mimics_shuffle(self) -> bool:
        """Whether to shuffle training rows as torchrec does.

        torchrec shuffles all days but the last, so that a single file stays as it is.
        """
        return self.config.is_compat and self.config.dataset_name == "criteo_1t"
