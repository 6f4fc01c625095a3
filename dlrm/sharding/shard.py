"""A plan becomes a sharded model, whose initial weights do not depend on the plan."""

import math
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from dlrm.kernels.embedding import replace_lookups, round_lookups
from dlrm.runtime import derive_seed
from dlrm.schema import TABLE_NAMES
from dlrm.sharding.sharder import TableSharder

_BLOCK_ROWS = 1 << 16


def shard_model(
    model: nn.Module, plan: ShardingPlan, sharder: TableSharder, device: torch.device, seed: int
) -> DistributedModelParallel:
    """Places tables by `plan`, makes the rest data parallel, and fills the tables.

    Collective. Table weights are uniform in +-1/sqrt(rows), as in the DLRM paper's code.
    """
    with warnings.catch_warnings():
        # TorchRec hands DistributedDataParallel an argument that newer torch spells otherwise.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        sharded = DistributedModelParallel(
            module=model,
            device=device,
            plan=plan,
            sharders=[sharder],  # type: ignore[list-item]
            init_data_parallel=dist.get_world_size() > 1,
        )
    tables = {name: weight for name, weight in sharded.state_dict().items() if ".embedding_bags." in name}
    assert len(tables) == len(TABLE_NAMES), "a table would be left without weights"
    for name, weight in tables.items():
        _fill_table(weight, name.split(".embedding_bags.")[1], seed)
    if device.type == "cpu":
        replace_lookups(sharded, sharder.pooled_type)
    else:
        round_lookups(sharded, sharder.pooled_type)
    return sharded


@torch.no_grad()
def _fill_table(weight: torch.Tensor | ShardedTensor, name: str, seed: int) -> None:
    """Draws this rank's part; each block of rows has a seed of its own, so that every sharding gives the same table."""
    if isinstance(weight, ShardedTensor):
        rows, dim = weight.metadata().size
        shards = [(s.tensor, s.metadata.shard_offsets[0], s.metadata.shard_offsets[1]) for s in weight.local_shards()]
    else:
        rows, dim = weight.shape
        shards = [(weight, 0, 0)]
    bound = 1 / math.sqrt(rows)
    for local, first_row, first_column in shards:
        stop_row = first_row + local.size(0)
        for block in range(first_row // _BLOCK_ROWS, -(-stop_row // _BLOCK_ROWS)):
            start, stop = block * _BLOCK_ROWS, min((block + 1) * _BLOCK_ROWS, rows)
            generator = torch.Generator(local.device).manual_seed(derive_seed(seed, "table", name, block))
            drawn = torch.empty(stop - start, dim, device=local.device).uniform_(-bound, bound, generator=generator)
            low, high = max(start, first_row), min(stop, stop_row)
            columns = slice(first_column, first_column + local.size(1))
            local[low - first_row : high - first_row].copy_(drawn[low - start : high - start, columns])
