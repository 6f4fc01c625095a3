"""Embedding tables in a checkpoint, read without torch, however they were sharded when it was written.

Shapes: R rows, D columns of a table.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dlrm.checkpoint.checkpoint import Checkpoint
from dlrm.checkpoint.manifest import Chunk, Tensor
from dlrm.errors import CheckpointError, reason_of

_PREFIX = "tables."
_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Table:
    """An embedding table of a checkpoint.

    Attributes:
        states: the tensors of the optimizer's state, by kind: sum, exp_avg, exp_avg_sq.
    """

    name: str
    weight: Tensor
    states: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        """How many ids it has a row for."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """The number of columns."""
        return self.weight.shape[1]

    @property
    def rows_at_once(self) -> int:
        """Rows of a block that is read at once."""
        return max(1, _BLOCK_BYTES // (4 * self.dim))

    @property
    def files(self) -> set[str]:
        """The files that hold its weights."""
        return {chunk.file for chunk in self.weight.chunks}


def tables_of(tensors: Mapping[str, Tensor]) -> dict[str, Table]:
    """A manifest's tables by name, t_cat_2 before t_cat_10.

    Raises:
        CheckpointError: if one is not a table.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_PREFIX):
            table, _, kind = name.removeprefix(_PREFIX).rpartition(".")
            found.setdefault(table, {})[kind] = tensor
    tables = {}
    for name in sorted(found, key=_in_order):
        weight = found[name].pop("weight", None)
        if weight is None or len(weight.shape) != 2 or min(weight.shape) == 0:
            raise CheckpointError(f"manifest.json is damaged: {name[:80]!r} is no table")
        tables[name] = Table(name, weight, found[name])
    return tables


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_blocks(checkpoint: Checkpoint, table: Table) -> Iterator[npt.NDArray[np.float32]]:
    """Yields a table's weights in blocks of some MiB: [rows_at_once, D], the last one shorter.

    Raises:
        CheckpointError: if a file is missing or too short, or the weights are not float32.
    """
    if table.weight.dtype != "float32":
        raise CheckpointError(f"{table.name} is {table.weight.dtype}, expected float32")
    store = checkpoint.store
    with ExitStack() as stack:
        try:
            opened = {name: stack.enter_context(store.open(checkpoint.name, name)) for name in table.files}
            for start in range(0, table.rows, table.rows_at_once):
                block_RD = np.zeros((min(table.rows_at_once, table.rows - start), table.dim), np.float32)
                for chunk in table.weight.chunks:
                    _fill(block_RD, start, chunk, opened[chunk.file])
                yield block_RD
        except OSError as error:
            checkpoint.check_is_there()
            raise CheckpointError(reason_of(error)) from None


def _fill(block_RD: npt.NDArray[np.float32], start: int, chunk: Chunk, file: Any) -> None:
    """Fills a block, whose first row is row `start` of the table, with the rows that a chunk has of it.

    Raises:
        CheckpointError: if its file ends too early.
    """
    (first, column), (rows, columns) = chunk.offsets, chunk.shape
    low, high = max(start, first), min(start + len(block_RD), first + rows)
    if low >= high or columns == 0:
        return
    file.seek(chunk.start + (low - first) * columns * block_RD.itemsize)
    size = (high - low) * columns * block_RD.itemsize
    data = file.read(size)
    if len(data) != size:
        raise CheckpointError(f"{chunk.file} ends too early. `dlrm inspect --verify` reads all of it")
    block_RD[low - start : high - start, column : column + columns] = np.frombuffer(data, "<f4").reshape(-1, columns)
