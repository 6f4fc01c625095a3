"""Expands each id to several as rows are read (see `dlrm.dataset.companions`).

Shapes: B rows, F features, H hotness of a feature.
"""

import mmap
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from dlrm.dataset.companions import COMPANIONS_SEED, Distribution, draw_table
from dlrm.errors import DatasetError
from dlrm.ranks.runtime import Runtime, on_every_rank
from dlrm.system.console import Progress, show_bytes
from dlrm.system.memory import MemoryBudget


@dataclass(frozen=True)
class Expansion:
    """What the tables of companions depend on.

    Attributes:
        table_rows: rows of each feature's table.
        hotness: ids per sample of each feature, the original one included.
        distribution: how companions are drawn.
    """

    table_rows: tuple[int, ...]
    hotness: tuple[int, ...]
    distribution: Distribution

    @property
    def num_bytes(self) -> int:
        """Memory of all tables."""
        return 4 * sum(rows * (hot - 1) for rows, hot in zip(self.table_rows, self.hotness, strict=True))

    def split(self, ids: npt.NDArray[np.int32]) -> "Companions":
        """The tables as views of `ids`, in which they stand one after the other."""
        tables = []
        first = 0
        for rows, hot in zip(self.table_rows, self.hotness, strict=True):
            tables.append(ids[first : first + rows * (hot - 1)].reshape(rows, hot - 1))
            first += rows * (hot - 1)
        return Companions(tuple(tables), self.hotness)

    def draw(self, label: str) -> "Companions":
        """Draws the tables into this process's memory.

        Args:
            label: of the progress bar; empty for no bar.
        """
        ids = np.empty(self.num_bytes // 4, np.int32)
        self._draw_into(ids, label)
        return self.split(ids)

    def _draw_into(self, ids: npt.NDArray[np.int32], label: str) -> None:
        generator = np.random.RandomState(COMPANIONS_SEED)
        progress = Progress(label, len(ids), "ids", shown=bool(label))
        done = 0
        for rows, hot in zip(self.table_rows, self.hotness, strict=True):
            for piece in draw_table(generator, self.distribution, rows, hot - 1):
                ids[done : done + len(piece)] = piece
                done += len(piece)
                progress.advance(len(piece))
        progress.close()

    def check_memory(self, available_bytes: int) -> None:
        """Refuses tables that don't fit into the memory of a host.

        Raises:
            DatasetError: saying how much is needed, and what to do instead.
        """
        if self.num_bytes > available_bytes:
            raise DatasetError(
                f"--multi_hot_sizes: {show_bytes(self.num_bytes)} of companions a host, {show_bytes(available_bytes)} "
                "free. Write the ids once with `dlrm materialize`, and give --synthetic_multi_hot_criteo_path."
            )


@dataclass(frozen=True)
class Companions:
    """Tables of companions: int32 [rows, hotness - 1] of each feature."""

    tables: tuple[npt.NDArray[np.int32], ...]
    hotness: tuple[int, ...]

    def expand(self, ids_BF: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int32], ...]:
        """Each id followed by its companions: int32 [B, H] for each feature. Ids must be inside their tables."""
        expanded = []
        for ids_B, table, hot in zip(ids_BF.T, self.tables, self.hotness, strict=True):
            ids_BH = np.empty((len(ids_B), hot), np.int32)
            ids_BH[:, 0] = ids_B
            if hot > 1:
                ids_BH[:, 1:] = table.take(ids_B, axis=0)
            expanded.append(ids_BH)
        return tuple(expanded)


def share_companions(expansion: Expansion, runtime: Runtime, budget: MemoryBudget, label: str) -> Companions:
    """Draws the tables once on each host, for all of its ranks. Collective.

    The first rank of a host draws them into an anonymous file. The others map that file, by its descriptor.

    Raises:
        DatasetError: if the tables do not fit into free memory, or can't be mapped.
    """
    if runtime.local_world_size == 1:
        expansion.check_memory(budget.left_on_host)
        return expansion.draw(label)
    handle = on_every_rank(runtime, partial(_draw_shared, expansion, runtime, budget, label))
    handles: list[tuple[int, int | None]] = [(0, None)] * runtime.world_size
    dist.all_gather_object(handles, (os.getpid(), handle), group=runtime.control_group)
    owner, descriptor = handles[runtime.rank - runtime.local_rank]
    ids = on_every_rank(runtime, partial(_map_shared, Path(f"/proc/{owner}/fd/{descriptor}"), expansion.num_bytes))
    if handle is not None:
        os.close(handle)
    return expansion.split(ids)


def _draw_shared(expansion: Expansion, runtime: Runtime, budget: MemoryBudget, label: str) -> int | None:
    """Descriptor of the anonymous file, on the first rank of a host; None on others."""
    if runtime.local_rank != 0:
        return None
    expansion.check_memory(budget.left_on_host)
    handle = os.memfd_create("companions")
    os.ftruncate(handle, expansion.num_bytes)
    with mmap.mmap(handle, expansion.num_bytes) as memory:
        ids = np.frombuffer(memory, np.int32)
        expansion._draw_into(ids, label)
        del ids  # or the mapping could not be closed
    return handle


def _map_shared(path: Path, num_bytes: int) -> npt.NDArray[np.int32]:
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ), np.int32)
    except OSError as error:
        raise DatasetError(
            f"--multi_hot_sizes: companions of the host's first rank can't be mapped ({error}). Write the ids once "
            "with `dlrm materialize`, and give --synthetic_multi_hot_criteo_path."
        ) from None
