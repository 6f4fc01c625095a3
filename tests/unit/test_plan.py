"""Plans are complete, honest about memory, and refused when they can't be had."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import pytest
import torch
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType

from dlrm.assembly.build import plan_run
from dlrm.assembly.optimizers import allowed_sharding_types, fuse_table_optimizer
from dlrm.config.config import Config, ModelConfig, OptimizerConfig, ShardingConfig
from dlrm.config.recipes import RECIPES
from dlrm.config.table_rules import SHARDING_TYPES
from dlrm.cost.optimizer_state import table_state_floats
from dlrm.errors import PlanError
from dlrm.loader.run_data import hotness_of
from dlrm.model.dlrm import DLRM, DLRMTrain
from dlrm.sharding.cluster import GIB, Cluster
from dlrm.sharding.placement import Placement
from dlrm.sharding.search import describe_plan

STATES = ("sgd", "adagrad", "rowwise_adagrad", "adam")


def make_plan(config: Config, cluster: Cluster) -> Placement:
    model = DLRM(config.model, torch.device("meta"))
    fuse_table_optimizer(model.embedding_bag_collection, config.optimizer)
    train = DLRMTrain(model, cluster.world_size)
    plan = plan_run(config, cluster, train, hotness_of(config))
    return describe_plan(plan, train, cluster.world_size, partial(table_state_floats, config))


def cpus(ranks: int, gib: float = 1.0) -> Cluster:
    return Cluster("cpu", ranks, ranks, int(gib * GIB))


def gpus(ranks: int, gib: float = 34.0, local_world_size: int = 8) -> Cluster:
    return Cluster("cuda", ranks, local_world_size, int(gib * GIB), 500 * GIB)


@pytest.mark.parametrize(
    ("recipe", "world_size", "gib"),
    [("spec_mlperf_a100x8", 8, 97.36), ("spec_mlperf_x2_a100x16", 16, 174.03), ("spec_full_size_a100x80", 80, 420.94)],
)
def test_the_examples_rows_fit_its_clusters(recipe: str, world_size: int, gib: float) -> None:
    cluster = Cluster("cuda", world_size, 8, int(40 * GIB * 0.85))
    placement = make_plan(RECIPES[recipe](), cluster)
    assert round(placement.gib, 2) == gib
    assert len(placement.tables) == 26
    assert max(placement.gib_per_rank) * GIB <= cluster.table_bytes
    # Every weight has a place; tables that are data parallel have one on each rank.
    copies = sum(table.gib * (world_size if table.sharding == "data_parallel" else 1) for table in placement.tables)
    assert sum(placement.gib_per_rank) == pytest.approx(copies, rel=1e-9)


def test_adagrad_doubles_what_a_table_takes() -> None:
    config = Config(model=ModelConfig(num_embeddings=1000), optimizer=OptimizerConfig(adagrad=True))
    placement = make_plan(config, cpus(2))
    assert sum(placement.gib_per_rank) == pytest.approx(2 * placement.gib)


def test_the_printed_plan_names_every_table_and_rank() -> None:
    placement = make_plan(Config(model=ModelConfig(num_embeddings=1000)), cpus(2))
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
        PlanError, match=r"6\.20 GiB of embedding tables.* 2 ranks of 2\.00 GiB .* each rank needs (\S+) GiB more"
    ) as caught:
        make_plan(config, cpus(2, 2.0))
    missing = float(str(caught.value).split("each rank needs ")[1].split()[0])
    assert missing == pytest.approx(1.1, abs=0.15)  # 3.1 GiB a rank and buffers, to the planner's 1 %
    roomy = cpus(2, 2 + missing + 0.05)
    assert max(make_plan(config, roomy).gib_per_rank) * GIB <= roomy.table_bytes
    for remedy in ("more ranks", "--embedding_dim", "--reserved_memory_share"):
        assert remedy in str(caught.value)
    assert "--optimizer" not in str(caught.value)  # SGD has no state to save
    with pytest.raises(PlanError, match="--optimizer with less state"):
        make_plan(dataclasses.replace(config, optimizer=OptimizerConfig(adagrad=True)), cpus(2, 2.0))


def refuse(kind: PlannerErrorType, text: str) -> Callable[..., NoReturn]:
    def plan(*_: object) -> NoReturn:
        raise PlannerError(text, kind)

    return plan


def test_what_is_not_for_want_of_memory_is_said_in_the_planners_words(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model=ModelConfig(num_embeddings=1000))
    refusal = refuse(PlannerErrorType.INVALID_RANK_ASSIGNMENT, "rank 7 of nothing\nand more")
    monkeypatch.setattr(EmbeddingShardingPlanner, "plan", refusal)
    with pytest.raises(PlanError, match=r"^no sharding plan: TorchRec's planner says: rank 7 of nothing$"):
        make_plan(config, cpus(2))
    monkeypatch.setattr(EmbeddingShardingPlanner, "plan", refuse(PlannerErrorType.STRICT_CONSTRAINTS, "no room"))
    with pytest.raises(PlanError, match=r"^no sharding plan, however much memory there is: .* says: no room$"):
        make_plan(config, cpus(2))


def constrained(rules: str, optimizer: str = "sgd", **model: object) -> Config:
    return Config(
        model=ModelConfig(**{"num_embeddings": 100_000, "embedding_dim": 64, **model}),
        sharding=ShardingConfig(table_constraints=rules, large_table_gib=0.1),
        optimizer=OptimizerConfig(optimizer=optimizer),
    )


def test_rules_are_kept() -> None:
    rows = (1_000_000, *[1000] * 24, 2_000_000)
    rules = (
        "large = row_wise; t_cat_1 t_cat_2 = table_wise ranks=1,3; t_cat_3 = column_wise ranks=0,2; "
        "t_cat_4 = data_parallel; t_cat_25 = column_wise"
    )
    placement = make_plan(constrained(rules, num_embeddings_per_feature=rows), cpus(4, 4.0))
    placed = {table.table: (table.sharding, table.ranks) for table in placement.tables}
    assert placed["t_cat_0"] == ("row_wise", (0, 1, 2, 3))
    assert {placed["t_cat_1"], placed["t_cat_2"]} == {("table_wise", (1,)), ("table_wise", (3,))}
    assert placed["t_cat_3"] == ("column_wise", (0, 2))
    assert placed["t_cat_4"] == ("data_parallel", (0, 1, 2, 3))
    assert placed["t_cat_25"] == ("column_wise", (0, 1, 2, 3))  # its own rule before that of `large`


def test_kernels_of_a_gpu_and_the_cache() -> None:
    rules = "all = fused_uvm; t_cat_0 = row_wise fused_uvm_caching cache=0.1; t_cat_1 = table_wise fused"
    config = constrained(rules)
    model = DLRM(config.model, torch.device("meta"))
    fuse_table_optimizer(model.embedding_bag_collection, config.optimizer)
    plan = plan_run(config, gpus(8), DLRMTrain(model, 8), hotness_of(config))
    placed = next(iter(plan.plan.values()))
    assert placed["t_cat_0"].cache_params.load_factor == 0.1
    assert [placed[f"t_cat_{i}"].compute_kernel for i in range(3)] == ["fused_uvm_caching", "fused", "fused_uvm"]


@pytest.mark.parametrize(
    ("rules", "cluster", "message"),
    [
        ("t_cat_0 = fused_uvm", cpus(2), "fused_uvm of t_cat_0 needs a GPU"),
        ("large = fused_uvm_caching cache=0.5", cpus(1, 60.0), "fused_uvm_caching of t_cat_25 needs a GPU"),
        ("t_cat_0 = table_wise ranks=2", cpus(2), "rank 2 of t_cat_0, expected 0 to 1"),
        ("t_cat_0 = column_wise ranks=0,1,2", cpus(3), "3 ranks of t_cat_0 can't share its 64 columns"),
        ("t_cat_1 = row_wise", cpus(2), "row_wise of t_cat_1 would split 1 row over 2 ranks and leave one without any"),
    ],
)
def test_rules_that_can_not_be_met_are_refused(rules: str, cluster: Cluster, message: str) -> None:
    rows = (1000, 1, *[1000] * 23, 10_000_000)
    with pytest.raises(PlanError, match=message):
        make_plan(constrained(rules, num_embeddings_per_feature=rows), cluster)


def test_a_table_larger_than_a_rank_is_split_by_rows_on_a_cpu_too() -> None:
    config = Config(
        model=ModelConfig(num_embeddings_per_feature=(8_000_000, *[1000] * 25), embedding_dim=64),
        optimizer=OptimizerConfig(optimizer="rowwise_adagrad"),
    )
    placement = make_plan(config, cpus(2, 1.3))
    assert [table.sharding for table in placement.tables] == ["row_wise"] + ["table_wise"] * 25
    assert {table.sharding for table in make_plan(config, cpus(2, 4.0)).tables} == {"table_wise"}


@pytest.mark.parametrize(("optimizer", "floats"), [("sgd", 0), ("adagrad", 64), ("rowwise_adagrad", 1), ("adam", 128)])
def test_optimizer_state_is_counted(optimizer: str, floats: int) -> None:
    placement = make_plan(constrained("all = table_wise", optimizer), gpus(2, local_world_size=2))
    table = placement.tables[0]
    assert table.optimizer_gib == pytest.approx(100_000 * floats * 4 / GIB)
    assert table.gib_by_rank == (pytest.approx(100_000 * (64 + floats) * 4 / GIB),)


def test_updates_do_not_depend_on_the_plan() -> None:
    kinds = {
        optimizer: allowed_sharding_types(OptimizerConfig(optimizer=optimizer), {}, "cuda") for optimizer in STATES
    }
    assert set(kinds["sgd"]) == set(kinds["adagrad"]) == set(SHARDING_TYPES)
    assert set(kinds["rowwise_adagrad"]) == {"table_wise", "row_wise", "table_row_wise", "data_parallel"}
    assert set(kinds["adam"]) == set(SHARDING_TYPES) - {"data_parallel"}
    with pytest.raises(PlanError, match="column_wise of t_cat_0 with --optimizer rowwise_adagrad"):
        make_plan(constrained("t_cat_0 = column_wise", "rowwise_adagrad"), cpus(2))
    with pytest.raises(PlanError, match=r"no fused Adam on a CPU. Add --table_constraints 'all = data_parallel'"):
        make_plan(constrained("t_cat_0 = data_parallel", "adam"), cpus(2))
    decayed = dataclasses.replace(
        constrained("t_cat_0 = data_parallel"), optimizer=OptimizerConfig(optimizer="rowwise_adagrad", weight_decay=0.1)
    )
    with pytest.raises(PlanError, match=r"--weight_decay 0.1: FBGEMM's kernels leave it out on a CPU"):
        make_plan(decayed, cpus(2))
    replicated = make_plan(constrained("all = data_parallel", "adam"), cpus(2, 4.0))
    assert {table.kernel for table in replicated.tables} == {"dense"}


def test_the_dense_kernel_is_data_parallel_whatever_the_optimizer() -> None:
    placement = make_plan(constrained("t_cat_3 = dense", "adam", num_embeddings=1000), gpus(2, local_world_size=2))
    assert [t.table for t in placement.tables if t.sharding == "data_parallel"] == ["t_cat_3"]
    assert len(placement.tables) == 26


def test_pinned_tables_are_placed_by_size() -> None:
    rows = (2_000_000, 1_000_000, 3_000_000, *[10] * 23)  # 0.48, 0.24, 0.72 GiB
    rules = "t_cat_0 t_cat_1 t_cat_2 = table_wise ranks=0,1"
    placement = make_plan(constrained(rules, num_embeddings_per_feature=rows), cpus(2, 0.8))
    assert placement.tables[2].ranks != placement.tables[0].ranks == placement.tables[1].ranks


def test_too_little_host_memory_is_not_taken_for_the_gpus() -> None:
    cluster = dataclasses.replace(gpus(2, local_world_size=2), host_bytes=GIB)
    with pytest.raises(PlanError, match=r"2 ranks of 1\.00 GiB of the host .* each rank needs \S+ GiB more"):
        make_plan(constrained("all = table_wise fused_uvm", num_embeddings=400_000), cluster)


def test_tables_of_a_host_take_its_memory() -> None:
    on_cpu = make_plan(Config(model=ModelConfig(num_embeddings=10_000)), cpus(2))
    assert on_cpu.host_bytes("cpu", 2) == pytest.approx(on_cpu.gib * GIB)
    on_gpu = make_plan(constrained("t_cat_0 = table_wise fused_uvm"), gpus(2, local_world_size=2))
    assert on_gpu.host_bytes("cuda", 8) == pytest.approx(on_gpu.tables[0].gib * GIB)


def test_a_rule_frees_its_own_table_only() -> None:
    """Data parallelism is left out with Adam, unless a rule names it for a table."""
    config = constrained("t_cat_0 = data_parallel", "adam", num_embeddings=100)
    cluster = dataclasses.replace(gpus(2, local_world_size=2), intra_host_bandwidth=0.01)  # where copies look cheap
    placement = make_plan(config, cluster)
    assert [t.table for t in placement.tables if t.sharding == "data_parallel"] == ["t_cat_0"]


def test_a_rule_of_large_tables_needs_one() -> None:
    with pytest.raises(PlanError, match=r"a rule of `large`, but no table has the 0.1 GiB"):
        make_plan(constrained("large = row_wise", num_embeddings=1000), cpus(2))


def test_columns_that_can_not_be_split_are_refused() -> None:
    config = constrained("t_cat_0 = column_wise", num_embeddings=100, embedding_dim=12, dense_arch_layer_sizes=(8, 12))
    with pytest.raises(PlanError, match="12 columns can't be split evenly over 2 ranks"):
        make_plan(config, cpus(2))
    assert make_plan(config, cpus(3)).tables[0].ranks == (0, 1, 2)
    assert make_plan(config, cpus(1)).tables[0].ranks == (0,)
