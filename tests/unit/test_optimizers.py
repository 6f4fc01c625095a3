"""What each part of the model is updated with."""

import warnings

import pytest
import torch

from dlrm.assembly.build import build_model, make_sharder, plan_run
from dlrm.assembly.optimizers import build_optimizer
from dlrm.config.config import Config, ModelConfig, OptimizerConfig, ShardingConfig, TrainingConfig
from dlrm.config.flags import parse_args
from dlrm.errors import ConfigError
from dlrm.loader.run_data import hotness_of
from dlrm.ranks.runtime import start_runtime
from dlrm.sharding.cluster import GIB, Cluster
from dlrm.sharding.shard import shard_model
from dlrm.train.schedule import LearningRateSchedule


def rates(optimizer: OptimizerConfig, sharding: str, step: int) -> dict[str, set[float]]:
    """Learning rates of a step by kind of optimizer."""
    config = Config(
        model=ModelConfig(
            num_embeddings=40, embedding_dim=8, dense_arch_layer_sizes=(16, 8), over_arch_layer_sizes=(16, 1)
        ),
        sharding=ShardingConfig(table_constraints=f"all = {sharding}"),
        optimizer=optimizer,
        training=TrainingConfig(seed=1),
    )
    with warnings.catch_warnings(), start_runtime() as runtime:
        warnings.simplefilter("ignore")
        model = build_model(config, runtime)
        plan = plan_run(config, Cluster("cpu", 1, 1, GIB), model, hotness_of(config))
        sharded = shard_model(model, plan, make_sharder(config), runtime.device, 1)
        combined = build_optimizer(sharded, config.optimizer)
        LearningRateSchedule(combined, config.optimizer).begin_step(step)
        parts: dict[str, set[float]] = {}
        for _, part in combined.optimizers:
            inner = getattr(part, "_optimizer", part)
            for group in part.param_groups:
                parts.setdefault(type(inner).__name__, set()).add(round(group["lr"], 6))
    return parts


def test_tables_and_dense_parts_have_rates_of_their_own() -> None:
    optimizer = OptimizerConfig(optimizer="adagrad", learning_rate=0.4, dense_learning_rate=0.1, lr_warmup_steps=4)
    assert rates(optimizer, "table_wise", step=2) == {"CombinedOptimizer": {0.2}, "Adagrad": {0.05}}
    assert rates(optimizer, "table_wise", step=9) == {"CombinedOptimizer": {0.4}, "Adagrad": {0.1}}
    assert rates(optimizer, "data_parallel", step=9) == {"Adagrad": {0.4, 0.1}}


def test_data_parallel_tables_have_the_tables_optimizer() -> None:
    optimizer = OptimizerConfig(optimizer="rowwise_adagrad", learning_rate=0.4, dense_learning_rate=0.1)
    assert rates(optimizer, "data_parallel", step=1) == {"RowWiseAdagrad": {0.4}, "Adagrad": {0.1}}
    assert rates(OptimizerConfig(optimizer="adam", learning_rate=0.4), "data_parallel", step=1) == {"AdamW": {0.4}}


@pytest.mark.parametrize(
    ("argv", "algorithm"),
    [
        ([], "sgd"),
        (["--adagrad"], "adagrad"),
        (["--optimizer", "rowwise_adagrad"], "rowwise_adagrad"),
        (["--recipe", "debug_cpu"], "adagrad"),
        (["--recipe", "debug_cpu", "--optimizer", "sgd"], "sgd"),
        (["--recipe", "debug_cpu", "--adagrad"], "adagrad"),
        (["--optimizer", "adagrad", "--adagrad"], "adagrad"),
    ],
)
def test_two_flags_name_the_optimizer(argv: list[str], algorithm: str) -> None:
    assert parse_args(argv).optimizer.algorithm == algorithm


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adagrad", "--optimizer", "sgd"], "--adagrad with --optimizer sgd: give one of the two"),
        (["--adagrad", "--optimizer", "adam"], "--adagrad with --optimizer adam: give one of the two"),
        (["--optimizer", "adagrad", "--weight_decay", "0.1"], "--weight_decay 0.1 needs --optimizer rowwise_adagrad"),
        (["--optimizer", "lamb"], "--optimizer lamb: expected"),
        (["--precision", "bf16", "--allow_tf32"], "--allow_tf32 with --precision bf16: give one of the two"),
        (["--dense_learning_rate", "0"], "--dense_learning_rate 0.0: expected more than 0"),
    ],
)
def test_contradictions_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_args(argv)
    assert "\n" not in str(caught.value)


def test_scores_are_fp32_under_autocast() -> None:
    config = Config(
        model=ModelConfig(
            num_embeddings=40, embedding_dim=8, dense_arch_layer_sizes=(16, 8), over_arch_layer_sizes=(16, 1)
        ),
        training=TrainingConfig(seed=1, precision="bf16"),
    )
    with start_runtime() as runtime:
        model = build_model(config, runtime)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model.over_arch[0](torch.randn(512, 8 + 27 * 13))
        logits = model.model.over_arch[1](hidden)
    assert (hidden.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    assert len(logits.unique()) > 500
