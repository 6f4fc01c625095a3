"""The run that both sides of a benchmark make: layers of the public example, tables that fit this machine."""

from dlrm.bench.harness.flags import DEFAULT_EMBEDDING_DIM, Shape, Workload
from dlrm.config.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    OutputConfig,
    ShardingConfig,
    TrainingConfig,
)
from dlrm.config.recipes import MLPERF_ROWS, spec_mlperf_a100x8
from dlrm.cost.optimizer_state import state_floats
from dlrm.errors import ConfigError
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES
from dlrm.system.host import available_memory_bytes

NUM_CACHED_BATCHES = 10
"""Batches that both sides cycle through, as many as the public example's random data set has."""

_BYTES_PER_WEIGHT = 4
_LEARNING_RATES = {"sgd": 0.1, "adagrad": 0.01, "rowwise_adagrad": 0.01}


def make_config(shape: Shape, steps: int, dim: int = DEFAULT_EMBEDDING_DIM) -> Config:
    """Config of our side: `steps` training steps on random data.

    Raises:
        ConfigError: if the tables can't be made small enough.
    """
    return Config(
        data=DataConfig(
            batch_size=shape.batch_size // shape.ranks,
            limit_train_batches=steps,
            num_generated_batches=NUM_CACHED_BATCHES,
            zipf_exponent=shape.exponent,
        ),
        model=make_model(table_rows(shape, dim), dim),
        # Fixed here: the memory that is free differs from round to round, and the plan would follow it.
        sharding=ShardingConfig(device_memory_gib=available_memory_bytes(shape.ranks) / 2**30 / shape.ranks),
        optimizer=OptimizerConfig(optimizer=shape.optimizer, learning_rate=_LEARNING_RATES[shape.optimizer]),
        training=TrainingConfig(seed=0, precision=shape.arithmetic),
        evaluation=EvaluationConfig(evaluate_on_epoch_end=False, evaluate_on_training_end=False),
        output=OutputConfig(log_every=100, print_progress=False),  # as often as a long run reports
    )


def make_model(rows: tuple[int, ...], dim: int = DEFAULT_EMBEDDING_DIM) -> ModelConfig:
    """The results table's layers over tables of these sizes. The last dense layer is as wide as the tables' rows."""
    layers = spec_mlperf_a100x8().model
    return ModelConfig(
        num_embeddings_per_feature=rows,
        embedding_dim=dim,
        dense_arch_layer_sizes=(*layers.dense_arch_layer_sizes[:-1], dim),
        over_arch_layer_sizes=layers.over_arch_layer_sizes,
    )


def table_rows(shape: Workload, dim: int = DEFAULT_EMBEDDING_DIM) -> tuple[int, ...]:
    """Rows of each table.

    Raises:
        ConfigError: if --tables_gib is too small for one row in each table.
    """
    if shape.rows == "uniform100k":
        return (shape.num_embeddings,) * NUM_CATEGORICAL_FEATURES
    bytes_per_row = _BYTES_PER_WEIGHT * (dim + state_floats(shape.optimizer, dim))
    rows = scale_rows(MLPERF_ROWS, int(shape.tables_gib * 2**30 / bytes_per_row))
    if rows is None:
        raise ConfigError(f"--tables_gib {shape.tables_gib:g}: too small for a row in each table. Give more.")
    return rows


def scale_rows(rows: tuple[int, ...], total: int) -> tuple[int, ...] | None:
    """The sizes times one factor: at least one row per table, at most `total` rows. None if `total` is too small."""
    if total < len(rows):
        return None
    low, high = 0.0, total / sum(rows)
    for _ in range(60):
        middle = (low + high) / 2
        scaled = [max(1, int(size * middle)) for size in rows]
        low, high = (middle, high) if sum(scaled) <= total else (low, middle)
    return tuple(max(1, int(size * low)) for size in rows)


def memory_gib(config: Config, optimizer: OptimizerName) -> float:
    """GiB of one side's tables and optimizer state, over all ranks."""
    dim = config.model.embedding_dim
    return sum(config.model.table_rows) * _BYTES_PER_WEIGHT * (dim + state_floats(optimizer, dim)) / 2**30
