"""Golden figures of `dlrm plan` and of the benchmarks' floor: a change of the arithmetic must not change them."""

import dataclasses
from typing import Any

import pytest

from dlrm.bench.harness.shape import make_model
from dlrm.config.config import Config, DataConfig, ModelConfig, OptimizerConfig, ShardingConfig, TrainingConfig
from dlrm.cost.hardware import GIB, HardwareConfig, hardware_of, parse_cluster
from dlrm.cost.least_work import (
    least_embedding_work,
    least_evaluation_work,
    least_interaction_work,
    least_training_work,
)
from dlrm.cost.optimizer_state import table_state_floats
from dlrm.plan.forecast import forecast
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.placement import Placement, TablePlacement

ROWS = 100_000
DIM = 64
PARTS = ("weights", "optimizer", "activations", "reserve", "free", "on_host")
TIMES = ("step_time_ms", "lookup_time_ms", "dense_time_ms", "communication_time_ms", "exposed_communication_time_ms")


def place(config: Config, kinds: list[tuple[str, str, tuple[int, ...]]]) -> Placement:
    """The tables with these ways of sharding, kernels and ranks in turn."""
    tables = []
    for number, name in enumerate(TABLE_NAMES):
        sharding, kernel, ranks = kinds[number % len(kinds)]
        floats = table_state_floats(config, name, DIM)
        whole = 4 * ROWS * (DIM + floats) / GIB
        held = whole if sharding == "data_parallel" else whole / len(ranks)
        gib, state = 4 * ROWS * DIM / GIB, 4 * ROWS * floats / GIB
        tables.append(TablePlacement(name, ROWS, DIM, gib, state, sharding, kernel, ranks, (held,) * len(ranks)))
    return Placement(4, tuple(tables))


MIXED = [
    ("table_wise", "fused", (1,)),
    ("row_wise", "fused", (0, 1, 2, 3)),
    ("table_row_wise", "fused", (2, 3)),
    ("data_parallel", "dense", (0, 1, 2, 3)),
    ("column_wise", "fused_uvm", (0, 2)),
    ("grid_shard", "fused", (0, 1, 2, 3)),
    ("table_wise", "fused_uvm_caching", (3,)),
]
SPREAD = [("table_wise", "fused", (rank,)) for rank in range(4)]
DCN = ModelConfig(num_embeddings=ROWS, interaction_type="dcn", dcn_num_layers=2, dcn_low_rank_dim=16)
BUCKETS = ModelConfig(
    num_embeddings=ROWS,
    interaction_type="projection",
    interaction_branch1_layer_sizes=(8, 128),
    standardize_dense=True,
    dense_buckets=5,
)
BASE = Config(data=DataConfig(batch_size=512), model=ModelConfig(num_embeddings=ROWS))
CASES: dict[str, tuple[str, Config, list[tuple[str, str, tuple[int, ...]]]]] = {
    "sgd on GPUs": ("h100:2x2", BASE, MIXED),
    "frozen, bf16, adagrad": (
        "a100_40gb:2x2",
        dataclasses.replace(
            BASE,
            optimizer=OptimizerConfig(optimizer="adagrad", freeze="t_cat_0,t_cat_1"),
            training=TrainingConfig(precision="bf16", pipeline="prefetch"),
        ),
        MIXED,
    ),
    "dcn, adam, fp16 on the way": (
        "b200:1x4",
        dataclasses.replace(
            BASE,
            model=DCN,
            optimizer=OptimizerConfig(optimizer="adam"),
            sharding=ShardingConfig(forward_comm_precision="fp16"),
        ),
        SPREAD,
    ),
    "projection of buckets on CPUs": (
        "cpu:2x2",
        dataclasses.replace(
            BASE,
            model=BUCKETS,
            optimizer=OptimizerConfig(optimizer="rowwise_adagrad"),
            training=TrainingConfig(pipeline="base"),
        ),
        SPREAD,
    ),
}
GOLDEN = {
    "sgd on GPUs": (
        [1.1857327740391175, 0.2511115676899113, 0.192, 0.9616118563492062, 0.7426212063492061],
        [0.7647600322961807, 0.0, 0.5184831768274307, 47.470159500837326, 271.24659729003906, 0.152587890625],
    ),
    "frozen, bf16, adagrad": (
        [5.691829169444117, 0.7278070176143807, 0.19800417087735414, 5.10394318095238, 4.766017980952382],
        [
            0.7647600322961807,
            0.7170763164758682,
            0.4776048809289932,
            23.49968047440052,
            134.54087829589844,
            0.30517578125,
        ],
    ),
    "dcn, adam, fp16 on the way": (
        [0.34193197142857146, 0.016, 0.272, 0.22243757142857143, 0.05393197142857144],
        [0.6429624706506729, 1.2859249413013458, 0.22509290277957916, 107.70568460226059, 610.1403350830078, 0.0],
    ),
    "projection of buckets on CPUs": (
        [71.13496635456258, 0.7459548413950485, 22.434896024608015, 47.95411548855951, 47.954115488559516],
        [0.7702380567789078, 0.16003550589084625, 0.3226291090250015, 152.9766713887453, 869.7704259395599, 0.0],
    ),
}
"""The five TIMES in milliseconds, the six PARTS of memory in GiB."""


def figures(cluster: str, config: Config, kinds: list[tuple[str, str, tuple[int, ...]]]) -> tuple[list[float], ...]:
    """Times of a step; parts of the memory, summed over all ranks."""
    shape = parse_cluster(cluster)
    hardware = hardware_of(shape, HardwareConfig(), None, None, None)
    facts: dict[str, Any] = forecast(config, shape, hardware, place(config, kinds))
    memory = [sum(rank[part] for rank in facts["memory_gib_per_rank"]) for part in PARTS]
    return [facts["step"][name] for name in TIMES], memory


@pytest.mark.parametrize("case", CASES)
def test_figures_of_a_plan(case: str) -> None:
    times, memory = figures(*CASES[case])
    expected_times, expected_memory = GOLDEN[case]
    assert times == pytest.approx(expected_times, rel=1e-12)
    assert memory == pytest.approx(expected_memory, rel=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "num_bytes"), [("sgd", 353_037_320), ("adagrad", 474_388_496), ("rowwise_adagrad", 372_788_496)]
)
def test_figures_of_a_floor(optimizer: str, num_bytes: int) -> None:
    model = make_model((ROWS,) * 26)
    training = least_training_work(model, optimizer, 4096, 100_000, 2)
    assert (training.flop, training.num_bytes) == (59_176_386_560, num_bytes)
    evaluation = least_evaluation_work(model, 4096, 100_000)
    assert (evaluation.flop, evaluation.num_bytes) == (19_743_637_504, 51_855_360)
    # Integers, which a result's JSON shows without a point.
    works = training, evaluation, least_interaction_work(model, 4096, 4), least_embedding_work(128, optimizer, 100_000)
    assert all(isinstance(number, int) for work in works for number in (work.flop, work.num_bytes))
