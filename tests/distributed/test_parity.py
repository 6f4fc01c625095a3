"""Two ranks compute what one rank computes, in every sharding that a CPU can run."""

import itertools
from pathlib import Path

import pytest
import torch
from torchrec.distributed.planner import ParameterConstraints

from dlrm.config import Config, DataConfig, ModelConfig, OptimizerConfig, OutputConfig, TrainingConfig
from dlrm.data.splits import open_run_splits
from dlrm.runtime import start_runtime
from dlrm.schema import TABLE_NAMES
from dlrm.sharding.plan import DeviceMemory, plan_sharding
from dlrm.sharding.shard import shard_model
from dlrm.train.optimizers import build_optimizer
from dlrm.train.run import build_model
from dlrm.train.trainer import Trainer
from tests.launching import launch

STEPS = 20


class Lines:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def append_metrics(self, line: dict) -> None:
        self.lines.append(line)


def train_losses(config: Config, sharding: str | None) -> list[float]:
    """Runs in a worker: the global loss of each step, with all tables sharded in one way."""
    constraint = ParameterConstraints(sharding_types=[sharding] if sharding else None, min_partition=4)
    constraints = dict.fromkeys(TABLE_NAMES, constraint) if sharding else None
    with start_runtime() as runtime:
        model = build_model(config, runtime)
        memory = DeviceMemory("cpu", 2**30)
        plan = plan_sharding(model, memory, runtime.world_size, runtime.local_world_size, 8, constraints)
        placed = {p.sharding_type for module in plan.plan.values() for p in module.values()}
        assert sharding is None or placed == {sharding}
        sharded = shard_model(model, plan, runtime.device, config.training.seed or 0)
        sink = Lines()
        optimizer = build_optimizer(sharded, config.optimizer)
        trainer = Trainer(config, runtime, open_run_splits(config, runtime), sharded, optimizer, sink)
        trainer.train()
        trainer.test()
    return [line.get("loss", line.get("logloss")) for line in sink.lines if line["kind"] in ("train", "val", "test")]


def make_config(ranks: int, *, adagrad: bool, interaction: str = "original") -> Config:
    return Config(
        data=DataConfig(batch_size=32 // ranks, limit_train_batches=STEPS, limit_val_batches=2, limit_test_batches=2),
        model=ModelConfig(
            num_embeddings_per_feature=tuple(range(3, 29)),
            embedding_dim=8,
            dense_arch_layer_sizes=(16, 8),
            over_arch_layer_sizes=(16, 1),
            interaction_type=interaction,
            interaction_branch1_layer_sizes=(16, 16),
            interaction_branch2_layer_sizes=(16, 16),
        ),
        optimizer=OptimizerConfig(learning_rate=0.01 if adagrad else 0.5, adagrad=adagrad),
        training=TrainingConfig(seed=5),
    )


CASES = [
    *((sharding, adagrad, "original") for sharding, adagrad in itertools.product(
        (None, "data_parallel", "table_wise", "column_wise"), (False, True))),
    (None, True, "dcn"),
    (None, False, "projection"),
]  # fmt: skip


def all_losses(ranks: int) -> list[list[float]]:
    """Runs in a worker: the losses of every case, in one process group."""
    torch.set_num_threads(1)
    with start_runtime():
        return [
            train_losses(make_config(ranks, adagrad=adagrad, interaction=interaction), sharding if ranks > 1 else None)
            for sharding, adagrad, interaction in CASES
        ]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[float]]]:
    folder: Path = tmp_path_factory.mktemp("rendezvous")
    return {ranks: launch(all_losses, ranks, ranks, folder=folder)[0] for ranks in (1, 2)}


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_two_ranks_agree_with_one_on_every_loss(losses: dict[int, list[list[float]]], case: int) -> None:
    one, two = losses[1][case], losses[2][case]
    assert len(one) == STEPS + 2  # and a validation, and a test
    assert two == pytest.approx(one, abs=1e-5)
    assert one[0] != one[-1]


def scheduled_losses(sharding: str, **optimizer: float) -> list[float]:
    """Losses of steps on one batch that comes again and again."""
    config = Config(
        data=DataConfig(batch_size=16, limit_train_batches=6, num_generated_batches=1),
        model=ModelConfig(
            num_embeddings=40, embedding_dim=8, dense_arch_layer_sizes=(16, 8), over_arch_layer_sizes=(16, 1)
        ),
        optimizer=OptimizerConfig(**optimizer),
        training=TrainingConfig(seed=3),
        output=OutputConfig(log_every=1, print_progress=False),
    )
    return train_losses(config, sharding)[:6]


# FBGEMM's dense lookup on a CPU (2026-11-23: fbgemm-gpu-cpu 1.8); dlrm.train.main says why.
@pytest.mark.filterwarnings("ignore:fbgemm..dense_embedding_codegen_lookup_function:UserWarning")
@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel"])
def test_the_schedule_sets_the_rate_of_tables_and_dense_parameters(sharding):
    full = scheduled_losses(sharding, learning_rate=0.4)
    half = scheduled_losses(sharding, learning_rate=0.2)
    warm = scheduled_losses(sharding, learning_rate=0.4, lr_warmup_steps=2)
    assert warm[1] == half[1] != full[1]
    assert warm[2] != half[2]
    stopped = scheduled_losses(sharding, learning_rate=0.4, lr_decay_start=1, lr_decay_steps=1)
    assert stopped[:2] == full[:2]
    assert stopped[2:] == pytest.approx([stopped[1]] * 4, abs=1e-6)
    assert abs(full[2] - full[1]) > 1e-4
