"""Two and four ranks compute what one rank computes, in every sharding, optimizer and precision that a CPU can run."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dlrm.assembly import build
from dlrm.assembly.foundation import lay_foundation
from dlrm.config.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ShardingConfig,
    TrainingConfig,
)
from dlrm.config.table_rules import SHARDING_TYPES
from dlrm.kernels.native import why_no_vnni
from dlrm.metrics.journal import Journal
from dlrm.ranks.runtime import start_runtime
from dlrm.train.trainer import Trainer
from tests.launching import launch

STEPS = 20
# Of 3, 5, 6 or 9 rows split by four, a rank would have none.
ROWS = (4, 7, 8, *range(10, 33))


class Lines:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def append_metrics(self, line: dict) -> None:
        self.lines.append(line)


def train_losses(config: Config, rows_at_once: int | None = None) -> list[float]:
    """Runs in a worker: the global loss of each step, of a validation and of a test."""
    if rows_at_once is not None:
        build.ROWS_AT_ONCE = rows_at_once
    with start_runtime() as runtime:
        foundation = lay_foundation(config, runtime, is_quiet=True)
        if rules := config.sharding.table_constraints:
            assert {table.sharding for table in foundation.placement.tables} == {rules.split()[-1]}
        sink = Lines()
        trainer = Trainer(foundation, Journal(sink))
        trainer.train()
        trainer.test()
    return [line.get("loss", line.get("logloss")) for line in sink.lines if line["kind"] in ("train", "val", "test")]


@dataclass(frozen=True)
class Case:
    """What is trained; `sharding` on several ranks only."""

    sharding: str | None = None
    optimizer: str = "sgd"
    interaction: str = "original"
    weight_decay: float = 0.0
    precision: str = "fp32"
    forward: str = "fp32"
    backward: str = "fp32"
    buckets: int = 0
    layers: tuple[int, ...] = (16,)
    tolerance: float = 1e-5

    def __str__(self) -> str:
        return "-".join(
            str(value) for value in dataclasses.astuple(self) if value not in ("fp32", 0, None, (16,), 1e-5, 1e-6)
        )

    @property
    def why_not(self) -> str | None:
        """Why this machine can't run it."""
        return why_no_vnni() if self.precision in ("int16", "int8") else None

    def config(self, ranks: int) -> Config:
        rules = f"all = {self.sharding}" if self.sharding and ranks > 1 else None
        if self.optimizer == "adam":
            rules = "all = data_parallel"
        return Config(
            data=DataConfig(
                batch_size=32 // ranks, limit_train_batches=STEPS, limit_val_batches=2, limit_test_batches=2
            ),
            model=ModelConfig(
                num_embeddings_per_feature=ROWS,
                embedding_dim=8,
                dense_arch_layer_sizes=(*self.layers, 8),
                over_arch_layer_sizes=(*self.layers, 1),
                interaction_type=self.interaction,
                standardize_dense=self.buckets > 0,
                dense_buckets=self.buckets,
                interaction_branch1_layer_sizes=(16, 16),
                interaction_branch2_layer_sizes=(16, 16),
            ),
            sharding=ShardingConfig(
                table_constraints=rules,
                forward_comm_precision=self.forward,
                backward_comm_precision=self.backward,
            ),
            optimizer=OptimizerConfig(
                learning_rate=0.5 if self.optimizer == "sgd" else 0.01,
                optimizer=self.optimizer,
                weight_decay=self.weight_decay,
            ),
            training=TrainingConfig(seed=5, precision=self.precision),
            output=OutputConfig(log_every=1, print_progress=False),
        )


WIDE = (64, 64)
"""Layers that go through integers."""

SPLIT_BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")
CASES = [
    *(
        Case(sharding, optimizer, tolerance=1e-6 if sharding == "data_parallel" else 1e-5)
        for sharding in (None, *SHARDING_TYPES)
        for optimizer in ("sgd", "adagrad", "rowwise_adagrad")
        if not (optimizer == "rowwise_adagrad" and sharding in SPLIT_BY_COLUMNS)
    ),
    Case("data_parallel", "adam"),
    Case("data_parallel", "adam", weight_decay=0.1),
    Case(None, "adagrad", "dcn"),
    Case(None, "sgd", "projection"),
    Case(None, "adagrad", buckets=5),
    Case(None, "adagrad", "dcn", buckets=5),
    Case(None, "adagrad", precision="bf16", tolerance=2e-3),
    *(Case(sharding, "adagrad", layers=WIDE) for sharding in (None, "row_wise")),
    *(
        Case(sharding, "adagrad", precision=precision, layers=WIDE, tolerance=1e-2 if precision == "int8" else 1e-3)
        for sharding in (None, "row_wise")
        for precision in ("int16", "int8")
    ),
    *(
        Case(sharding, "adagrad", forward=forward, backward=backward, tolerance=2e-3)
        for sharding in ("table_wise", "row_wise")
        for forward, backward in (("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp16"))
    ),
]


def all_losses(ranks: int) -> list[list[float]]:
    """Runs in a worker: the losses of every case, in one process group. On one rank many are the same run."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "fbgemm..dense_embedding_codegen_lookup_function")
    with start_runtime():
        losses: dict[Config, list[float]] = {}
        for case in CASES:
            if (config := case.config(ranks)) not in losses and case.why_not is None:
                losses[config] = train_losses(config)
        return [losses.get(case.config(ranks), []) for case in CASES]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[float]]]:
    folder: Path = tmp_path_factory.mktemp("rendezvous")
    return {ranks: launch(all_losses, ranks, ranks, folder=folder)[0] for ranks in (1, 2, 4)}


def skip_unless_run(case: Case) -> None:
    if (why := case.why_not) is not None:
        pytest.skip(why)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_ranks_agree_with_one_on_every_loss(losses: dict[int, list[list[float]]], case: int, ranks: int) -> None:
    skip_unless_run(CASES[case])
    one, several = losses[1][case], losses[ranks][case]
    assert len(one) == STEPS + 2  # and a validation, and a test
    assert several == pytest.approx(one, abs=CASES[case].tolerance)
    assert one[0] != one[-1]


ROUNDED = [number for number, case in enumerate(CASES) if case.tolerance > 1e-5]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", ROUNDED, ids=lambda i: str(CASES[i]))
def test_what_is_rounded_is_rounded_in_truth(losses: dict[int, list[list[float]]], case: int, ranks: int) -> None:
    skip_unless_run(CASES[case])
    exact = dataclasses.replace(CASES[case], precision="fp32", forward="fp32", backward="fp32", tolerance=1e-5)
    assert losses[ranks][case] != pytest.approx(losses[ranks][CASES.index(exact)], abs=1e-5)


def losses_of_batches_and_of_pieces() -> list[tuple[list[float], list[float]]]:
    """Runs in a worker."""
    torch.set_num_threads(1)
    with start_runtime():
        configs = [case.config(2) for case in IN_PIECES]
        return [(train_losses(config), train_losses(config, rows_at_once=10)) for config in configs]


IN_PIECES = [
    case
    for case in CASES
    if case.optimizer == "adagrad" and case.sharding in (None, "row_wise") and case.why_not is None
]


def test_steps_in_pieces_of_a_batch_train_alike(tmp_path: Path) -> None:
    found = launch(losses_of_batches_and_of_pieces, 2, folder=tmp_path)[0]
    for case, (batches, pieces) in zip(IN_PIECES, found, strict=True):
        assert pieces == pytest.approx(batches, abs=case.tolerance)


def scheduled_losses(sharding: str, **optimizer: float) -> list[float]:
    """Losses of steps on one batch that comes again and again."""
    config = Config(
        data=DataConfig(batch_size=16, limit_train_batches=6, num_generated_batches=1),
        model=ModelConfig(
            num_embeddings=40,
            embedding_dim=8,
            dense_arch_layer_sizes=(16, 8),
            over_arch_layer_sizes=(16, 1),
        ),
        sharding=ShardingConfig(table_constraints=f"all = {sharding}"),
        optimizer=OptimizerConfig(**optimizer),
        training=TrainingConfig(seed=3),
        output=OutputConfig(log_every=1, print_progress=False),
    )
    return train_losses(config)[:6]


# FBGEMM's dense lookup on a CPU (2026-11-23: fbgemm-gpu-cpu 1.8); dlrm.system.quiet says why.
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
