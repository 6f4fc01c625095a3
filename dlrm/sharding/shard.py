"""From a plan to a sharded model. Its initial weights do not depend on the plan."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.overrides import TorchFunctionMode
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from dlrm.kernels.draw import draw_uniform
from dlrm.ranks.runtime import derive_seed
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.host.gradients import replace_averages
from dlrm.sharding.host.lookups import freeze_lookups, replace_lookups, round_lookups
from dlrm.sharding.host.pooled_rows import replace_exchanges
from dlrm.sharding.sharder import TableSharder

_BLOCK_ROWS = 1 << 16


def shard_model(
    model: nn.Module,
    plan: ShardingPlan,
    sharder: TableSharder,
    device: torch.device,
    seed: int | None,
    frozen: Collection[str] = (),
) -> DistributedModelParallel:
    """Places tables by `plan`, makes the rest data parallel, and draws the tables' weights.

    Collective. Weights are uniform in +-1/sqrt(rows), as in the DLRM paper's code.

    Args:
        seed: decides the weights; None leaves them undrawn, to be restored from a checkpoint.
        frozen: names of tables that kernels must not update in the backward pass.
    """
    with warnings.catch_warnings(), _NothingDrawn():
        # TorchRec passes DistributedDataParallel an argument that has another name in newer torch.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        # 2026-11-30: torchrec 1.6 asks torch 2.11 for a group's device by a deprecated name.
        warnings.filterwarnings("ignore", "`_get_pg_default_device` will be|Multiple backends are registered with this")
        sharded = DistributedModelParallel(
            module=model,
            device=device,
            plan=plan,
            sharders=[sharder],  # type: ignore[list-item]
            init_data_parallel=dist.get_world_size() > 1,
        )
    tables = {name: weight for name, weight in sharded.state_dict().items() if ".embedding_bags." in name}
    assert len(tables) == len(TABLE_NAMES), "a table would get no weights"
    if seed is not None:
        _draw(tables, seed)
    if frozen:
        freeze_lookups(sharded, frozen)
    if device.type == "cpu":
        replace_lookups(sharded, sharder.pooled_type)
        replace_exchanges(sharded)
        replace_averages(sharded)
    else:
        round_lookups(sharded, sharder.pooled_type)
    return sharded


def _draw(tables: Mapping[str, torch.Tensor | ShardedTensor], seed: int) -> None:
    """Draws this rank's parts of the tables."""
    blocks = (
        block for name, weight in tables.items() for block in _blocks(weight, name.split(".embedding_bags.")[1], seed)
    )
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for _ in threads.map(_Block.fill, blocks):
            pass


class _NothingDrawn(TorchFunctionMode):
    """Skips TorchRec's own draw of weights. We replace them anyway, and it takes as long as all the rest here."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls `func`, unless it draws weights."""
        del types
        return args[0] if func is torch.Tensor.uniform_ else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Block:
    """This rank's part of a block of a table's rows.

    Attributes:
        part: rows from `row` of the block on, columns from `column` of the table on.
        rows: rows of the block.
        dim: columns of the table.
        bound: weights are uniform in +-bound.
    """

    part: torch.Tensor
    row: int
    column: int
    rows: int
    dim: int
    bound: float
    seed: int

    @torch.no_grad()
    def fill(self) -> None:
        """Draws the whole block and keeps our part, so that every sharding gives the same table."""
        if self.part.shape == (self.rows, self.dim) and self.part.is_contiguous():
            draw_uniform(self.part, self.bound, self.seed)
            return
        drawn = torch.empty(self.rows, self.dim, device=self.part.device)
        draw_uniform(drawn, self.bound, self.seed)
        rows, columns = self.part.shape
        self.part.copy_(drawn[self.row : self.row + rows, self.column : self.column + columns])


def _blocks(weight: torch.Tensor | ShardedTensor, name: str, seed: int) -> Iterator[_Block]:
    """This rank's part of a table, in blocks of rows that each have their own seed."""
    if isinstance(weight, ShardedTensor):
        rows, dim = weight.metadata().size
        shards = [(s.tensor, s.metadata.shard_offsets[0], s.metadata.shard_offsets[1]) for s in weight.local_shards()]
    else:
        rows, dim = weight.shape
        shards = [(weight, 0, 0)]
    for local, first_row, first_column in shards:
        stop_row = first_row + local.size(0)
        for block in range(first_row // _BLOCK_ROWS, -(-stop_row // _BLOCK_ROWS)):
            start, stop = block * _BLOCK_ROWS, min((block + 1) * _BLOCK_ROWS, rows)
            low, high = max(start, first_row), min(stop, stop_row)
            part = local[low - first_row : high - first_row]
            block_seed = derive_seed(seed, "table", name, block)
            yield _Block(part, low - start, first_column, stop - start, dim, 1 / math.sqrt(rows), block_seed)
