"""The shapes that the cost model of `dlrm plan` is held to: what each has much of, and the run that it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from dlrm.bench.harness.flags import WARM_UP_STEPS
from dlrm.bench.harness.our_side import lay_timed_foundation, training_turns
from dlrm.bench.harness.rank_ceilings import measure_rank
from dlrm.bench.harness.shape import NUM_CACHED_BATCHES, make_model
from dlrm.bench.harness.workers import Turns
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
from dlrm.ranks.runtime import Runtime, start_runtime
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES

CEILINGS = "ceilings"
Sharding = dict[str, tuple[str, tuple[int, ...]]]
"""Of each table: sharding type and ranks."""


@dataclass(frozen=True)
class Case:
    """A shape.

    Attributes:
        batch_size: samples of a step, over all ranks.
        steps: timed in a round, after those that warm up.
        hotness: ids per sample of each feature.
        rules: --table_constraints, on more than one rank.
    """

    name: str
    batch_size: int
    steps: int
    model: ModelConfig
    hotness: int = 1
    optimizer: OptimizerName = "sgd"
    rules: str | None = None

    def config(self, ranks: int) -> Config:
        """The run of each of so many ranks: fp32, random ids, uniform, which cycle some batches."""
        sizes = (self.hotness,) * NUM_CATEGORICAL_FEATURES if self.hotness > 1 else None
        return Config(
            data=DataConfig(
                batch_size=self.batch_size // ranks,
                limit_train_batches=WARM_UP_STEPS + self.steps,
                num_generated_batches=NUM_CACHED_BATCHES,
                multi_hot_sizes=sizes,
            ),
            model=self.model,
            sharding=ShardingConfig(table_constraints=self.rules if ranks > 1 else None),
            optimizer=OptimizerConfig(optimizer=self.optimizer, learning_rate=0.01),
            training=TrainingConfig(seed=0, precision="fp32"),
            evaluation=EvaluationConfig(evaluate_on_epoch_end=False, evaluate_on_training_end=False),
            output=OutputConfig(log_every=100, print_progress=False),
        )


def _model(rows: int, dim: int, dense: tuple[int, ...], over: tuple[int, ...], **values: Any) -> ModelConfig:
    return ModelConfig(
        num_embeddings=rows,
        embedding_dim=dim,
        dense_arch_layer_sizes=(*dense, dim),
        over_arch_layer_sizes=(*over, 1),
        **values,
    )


_RESULTS_TABLE = make_model((100_000,) * NUM_CATEGORICAL_FEATURES)

CASES = (
    Case("results_table_4096", 4096, 5, _RESULTS_TABLE),
    Case("results_table_1024", 1024, 12, _RESULTS_TABLE),
    Case("embedding_heavy", 2048, 15, _model(200_000, 64, (64,), (64,)), hotness=8),
    Case("dense_heavy", 1024, 12, _model(1000, 64, (1024, 1024), (2048, 1024))),
    Case("communication_heavy", 4096, 15, _model(50_000, 64, (64,), (64,)), rules="all = row_wise"),
    Case("small_batch", 64, 100, _model(10_000, 16, (64,), (128,)), optimizer="adagrad"),
    Case("middle", 512, 40, _model(100_000, 32, (256,), (512, 256)), optimizer="rowwise_adagrad"),
    Case(
        "cross_layers",
        1024,
        15,
        _model(20_000, 32, (256,), (256,), interaction_type="dcn", dcn_num_layers=3, dcn_low_rank_dim=64),
    ),
)


@contextmanager
def open_cases(cases: tuple[Case, ...]) -> Iterator[Turns]:
    """In each rank: a turn for each case, by its name, and one for `ceilings`."""
    with start_runtime() as runtime:
        turns = {case.name: partial(train_case, case, runtime) for case in cases}
        yield {**turns, CEILINGS: partial(measure_rank, runtime.world_size)}


def train_case(case: Case, runtime: Runtime) -> dict[str, Any]:
    """Builds a case's training anew, and trains: seconds of each step, threads of this rank, where tables are."""
    foundation, clock = lay_timed_foundation(case.config(runtime.world_size), runtime)
    turns = training_turns(foundation, clock)
    placed: Sharding = {
        table: (sharding.sharding_type, tuple(sharding.ranks or ()))
        for module in foundation.model.plan.plan.values()
        for table, sharding in module.items()  # type: ignore[attr-defined] # an EmbeddingModuleShardingPlan is a dict
    }
    return {"step_seconds": turns["train"](), "threads": turns["describe"]()["threads"], "sharding": placed}
