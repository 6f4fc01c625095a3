"""Plans are complete, honest about memory, and refused when they can't be had."""

import pytest
import torch

from dlrm.config import Config, ModelConfig, OptimizerConfig
from dlrm.errors import PlanError
from dlrm.model.dlrm import DLRM, DLRMTrain
from dlrm.recipes import RECIPES
from dlrm.sharding.plan import GIB, DeviceMemory, Placement, describe_plan, plan_sharding
from dlrm.train.optimizers import fuse_table_optimizer, table_state_floats_per_weight


def make_plan(config: Config, memory: DeviceMemory, world_size: int, local_world_size: int) -> Placement:
    model = DLRM(config.model, torch.device("meta"))
    fuse_table_optimizer(model.embedding_bag_collection, config.optimizer)
    train = DLRMTrain(model, world_size)
    plan = plan_sharding(train, memory, world_size, local_world_size, config.data.batch_size)
    return describe_plan(plan, train, world_size, table_state_floats_per_weight(config.optimizer))


@pytest.mark.parametrize(
    ("recipe", "world_size", "gib"),
    [("spec_mlperf_a100x8", 8, 97.36), ("spec_mlperf_x2_a100x16", 16, 174.03), ("spec_full_size_a100x80", 80, 420.94)],
)
def test_the_examples_rows_fit_its_clusters(recipe: str, world_size: int, gib: float) -> None:
    memory = DeviceMemory("cuda", int(40 * GIB * 0.85))
    placement = make_plan(RECIPES[recipe](), memory, world_size, 8)
    assert round(placement.gib, 2) == gib
    assert len(placement.tables) == 26
    assert max(placement.gib_per_rank) * GIB <= memory.table_bytes
    # Every weight has a place; tables that are data parallel have one on each rank.
    copies = sum(table.gib * (world_size if table.sharding == "data_parallel" else 1) for table in placement.tables)
    assert sum(placement.gib_per_rank) == pytest.approx(copies, rel=1e-9)


def test_adagrad_doubles_what_a_table_takes() -> None:
    config = Config(model=ModelConfig(num_embeddings=1000), optimizer=OptimizerConfig(adagrad=True))
    placement = make_plan(config, DeviceMemory("cpu", GIB), 2, 2)
    assert sum(placement.gib_per_rank) == pytest.approx(2 * placement.gib)


def test_the_printed_plan_names_every_table_and_rank() -> None:
    placement = make_plan(Config(model=ModelConfig(num_embeddings=1000)), DeviceMemory("cpu", GIB), 2, 2)
    lines = placement.to_text().splitlines()
    assert lines[0].split() == ["table", "rows", "dim", "GiB", "sharding", "kernel", "ranks"]
    assert [line.split()[0] for line in lines[1:27]] == [f"t_cat_{i}" for i in range(26)]
    assert lines[1].split()[1:6] == ["1,000", "64", "0.0002", "table_wise", "fused"]
    assert lines[27:] == [
        f"rank {rank}: {gib:.4f} GiB with optimizer state" for rank, gib in enumerate(placement.gib_per_rank)
    ]


def test_what_does_not_fit_is_refused_with_the_shortfall() -> None:
    config = Config(model=ModelConfig(num_embeddings=1_000_000))  # 6.2 GiB of tables
    with pytest.raises(
        PlanError, match=r"6\.20 GiB of embedding tables.* 2 ranks of 2\.00 GiB .* (\S+) GiB a rank more"
    ) as caught:
        make_plan(config, DeviceMemory("cpu", 2 * GIB), 2, 2)
    missing = float(str(caught.value).split(" GiB a rank more")[0].split()[-1])
    assert missing == pytest.approx(1.1, abs=0.15)  # 3.1 GiB a rank and buffers, to the planner's 1 %
    roomy = DeviceMemory("cpu", int((2 + missing + 0.05) * GIB))
    assert max(make_plan(config, roomy, 2, 2).gib_per_rank) * GIB <= roomy.table_bytes
