"""The run that both sides make: the shape of the public example's results table, with tables that fit this machine."""

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
from dlrm.errors import ConfigError
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES
from dlrm.system.host import available_memory_bytes

NUM_CACHED_BATCHES = 10
"""As the public example's random data set has."""

_BYTES_PER_WEIGHT = 4
_LEARNING_RATES = {"sgd": 0.1, "adagrad": 0.01, "rowwise_adagrad": 0.01}


def make_config(shape: Shape, steps: int, dim: int = DEFAULT_EMBEDDING_DIM) -> Config:
    """Our side's run of `steps` training steps, on random data.

    Raises:
        ConfigError: if the tables can't be made so small.
    """
    return Config(
        data=DataConfig(
            batch_size=shape.batch_size // shape.ranks,
            limit_train_batches=steps,
            num_generated_batches=NUM_CACHED_BATCHES,
            zipf_exponent=shape.exponent,
        ),
        model=make_model(table_rows(shape, dim), dim),
        # Said once, or what is free at each start could give one side another plan in each round.
        sharding=ShardingConfig(device_memory_gib=available_memory_bytes(shape.ranks) / 2**30 / shape.ranks),
        optimizer=OptimizerConfig(optimizer=shape.optimizer, learning_rate=_LEARNING_RATES[shape.optimizer]),
        training=TrainingConfig(seed=0, precision=shape.arithmetic),
        evaluation=EvaluationConfig(evaluate_on_epoch_end=False, evaluate_on_training_end=False),
        output=OutputConfig(log_every=100, print_progress=False),  # what a long run reports at
    )


def make_model(rows: tuple[int, ...], dim: int = DEFAULT_EMBEDDING_DIM) -> ModelConfig:
    """The layers of the results table over tables of these sizes, the last dense layer as wide as their rows."""
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
        ConfigError: if --tables_gib holds no row of each table.
    """
    if shape.rows == "uniform100k":
        return (shape.num_embeddings,) * NUM_CATEGORICAL_FEATURES
    bytes_per_row = _BYTES_PER_WEIGHT * (dim + state_floats(shape.optimizer, dim))
    rows = scale_rows(MLPERF_ROWS, int(shape.tables_gib * 2**30 / bytes_per_row))
    if rows is None:
        raise ConfigError(f"--tables_gib {shape.tables_gib:g}: too little for a row in each table. Give more.")
    return rows


def scale_rows(rows: tuple[int, ...], total: int) -> tuple[int, ...] | None:
    """The sizes times one factor, no table without a row, `total` rows in all at the most; None if that can't be."""
    if total < len(rows):
        return None
    low, high = 0.0, total / sum(rows)
    for _ in range(60):
        middle = (low + high) / 2
        scaled = [max(1, int(size * middle)) for size in rows]
        low, high = (middle, high) if sum(scaled) <= total else (low, middle)
    return tuple(max(1, int(size * low)) for size in rows)


def state_floats(optimizer: OptimizerName, dim: int) -> int:
    """Optimizer state of a row of `dim` weights, in floats."""
    return OptimizerConfig(optimizer=optimizer).table_state_floats(dim)


def memory_gib(config: Config, optimizer: OptimizerName) -> float:
    """Tables and optimizer state of one side, all ranks together."""
    dim = config.model.embedding_dim
    return sum(config.model.table_rows) * _BYTES_PER_WEIGHT * (dim + state_floats(optimizer, dim)) / 2**30
