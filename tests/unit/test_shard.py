"""What tables start from."""

import math
import warnings

import pytest
import torch

from dlrm.assembly.build import build_model, make_sharder, plan_run
from dlrm.config.config import Config, ModelConfig, ShardingConfig, TrainingConfig
from dlrm.loader.run_data import hotness_of
from dlrm.ranks.runtime import derive_seed, start_runtime
from dlrm.sharding.cluster import GIB, Cluster
from dlrm.sharding.shard import shard_model

BLOCK_ROWS = 1 << 16
ROWS = (BLOCK_ROWS + 1000, *range(3, 28))


def expected(name: str, rows: int, dim: int, seed: int) -> torch.Tensor:
    """Each block of 65,536 rows from a seed of its own."""
    bound = 1 / math.sqrt(rows)
    blocks = []
    for number, first in enumerate(range(0, rows, BLOCK_ROWS)):
        generator = torch.Generator().manual_seed(derive_seed(seed, "table", name, number))
        size = min(BLOCK_ROWS, rows - first)
        blocks.append(torch.empty(size, dim).uniform_(-bound, bound, generator=generator))
    return torch.cat(blocks)


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "data_parallel"])
def test_tables_are_drawn_once_by_seed_name_and_block(sharding):
    config = Config(
        model=ModelConfig(
            num_embeddings_per_feature=ROWS,
            embedding_dim=8,
            dense_arch_layer_sizes=(16, 8),
            over_arch_layer_sizes=(16, 1),
        ),
        sharding=ShardingConfig(table_constraints=f"all = {sharding}"),
        training=TrainingConfig(seed=1),
    )
    with warnings.catch_warnings(), start_runtime() as runtime:
        warnings.simplefilter("ignore")
        model = build_model(config, runtime)
        dense = {name: part.clone() for name, part in model.model.dense_arch.named_parameters()}
        plan = plan_run(config, Cluster("cpu", 1, 1, GIB), model, hotness_of(config))
        state = torch.get_rng_state()
        sharded = shard_model(model, plan, make_sharder(config), runtime.device, 7)
        if sharding != "data_parallel":  # whose kernels draw by another way, for small tables
            assert torch.equal(torch.get_rng_state(), state)
        found = {
            name.split(".")[-2]: weight.local_shards()[0].tensor if hasattr(weight, "local_shards") else weight
            for name, weight in sharded.state_dict().items()
            if ".embedding_bags." in name
        }
        for index, rows in enumerate(ROWS):
            name = f"t_cat_{index}"
            torch.testing.assert_close(found[name], expected(f"{name}.weight", rows, 8, 7), rtol=0, atol=0)
        for name, part in sharded.module.model.dense_arch.named_parameters():
            assert torch.equal(part, dense[name])
