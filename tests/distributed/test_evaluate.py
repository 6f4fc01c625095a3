"""A checkpoint scored on any ranks and with any sharding: the metrics that training had."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dlrm.checkpoint.dcp import Reader
from dlrm.checkpoint.store import open_store
from dlrm.config.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    ShardingConfig,
    TrainingConfig,
)
from dlrm.config.interval import Interval
from dlrm.evaluate.config import parse_evaluate
from dlrm.evaluate.run import score_checkpoint
from dlrm.ranks.runtime import Runtime, on_main_rank, start_runtime
from dlrm.system.signals import StopSignals
from dlrm.train.run import run
from tests.distributed.test_faults import write_days
from tests.launching import launch, read_metrics, read_summary

METRICS = ("auroc", "logloss", "ne", "calibration", "num_samples", "num_positives")
DAYS, OTHER_DAYS = (331, 203), (40, 91)


@dataclass(frozen=True)
class Case:
    """A run whose checkpoints are scored."""

    name: str
    ranks: int
    optimizer: str
    sharding: str | None = None
    has_statistics: bool = False
    undersampling_rate: float | None = None
    is_random: bool = False

    def config(self, folder: Path) -> Config:
        return Config(
            data=DataConfig(
                in_memory_binary_criteo_path=None if self.is_random else str(folder / "days"),
                batch_size=16,
                test_batch_size=24,
                undersampling_rate=self.undersampling_rate,
            ),
            model=ModelConfig(
                num_embeddings_per_feature=tuple(range(20, 46)),
                embedding_dim=8,
                dense_arch_layer_sizes=(16, 8),
                over_arch_layer_sizes=(16, 1),
                standardize_dense=self.has_statistics,
                dense_buckets=4 if self.has_statistics else 0,
            ),
            sharding=ShardingConfig(table_constraints=self.sharding),
            optimizer=OptimizerConfig(learning_rate=0.05, optimizer=self.optimizer),
            training=TrainingConfig(seed=5),
            evaluation=EvaluationConfig(validation_freq_within_epoch=4),
            checkpoint=CheckpointConfig(checkpoint_every=Interval("3"), keep=9),
            output=OutputConfig(run_dir=str(folder / self.name), print_progress=False, log_every=1),
        )


CASES = [
    Case("sgd on one rank", 1, "sgd", undersampling_rate=0.5),
    Case("Adagrad mit Umläuten", 1, "adagrad", has_statistics=True),
    Case("adam", 1, "adam", "all = data_parallel"),
    Case("random", 1, "sgd", is_random=True),
    Case("rows", 2, "rowwise_adagrad", "all = row_wise", has_statistics=True),
    Case("columns", 2, "adagrad", "all = column_wise"),
    Case("tables", 2, "sgd", "all = table_wise", undersampling_rate=0.25),
]
SCORED = [
    (CASES[0], 1, "all = data_parallel"),
    (CASES[0], 2, "all = column_wise; t_cat_1 = row_wise"),
    (CASES[1], 2, "all = row_wise"),
    (CASES[2], 2, "all = table_wise; t_cat_3 = data_parallel"),
    (CASES[3], 1, "all = table_wise"),
    (CASES[4], 1, "all = table_wise"),
    (CASES[4], 2, "all = column_wise"),
    (CASES[5], 2, "all = row_wise"),
    (CASES[6], 1, "all = table_wise"),
]
"""A case, and where it is scored: on how many ranks, with which sharding."""
RANKS = (1, 2)


def work(folder: Path, ranks: int, trains: bool, scores: bool) -> None:
    """Runs in a worker: trains the cases of so many ranks, and scores what is there.

    Writes FOLDER/scores/{case}-{ranks}.json, and scores of an older checkpoint and of other days.
    """
    warnings.filterwarnings("ignore", "fbgemm..dense_embedding_codegen_lookup_function")
    torch.set_num_threads(1)

    def score(name: str, path: Path, *flags: str) -> None:
        argv = ["--checkpoint", str(path), "--json", str(folder / "scores" / f"{name}.json"), *flags]
        score_checkpoint(parse_evaluate(argv), argv, runtime)

    with start_runtime() as runtime:
        for case in CASES:
            if trains and case.ranks == ranks:
                run(case.config(folder), runtime, 0.0, StopSignals())
        if not scores:
            return
        for case, on_ranks, rules in SCORED:
            if on_ranks == ranks:
                score(f"{case.name}-{ranks}", folder / case.name, "--table_constraints", rules)
        whole = ("--table_constraints", "all = table_wise")
        first = folder / CASES[0].name / "checkpoints"
        score(f"step 4-{ranks}", first / "step_0000000004", *whole, "--split", "val")
        going = folder / f"going-{ranks}"
        with removing(going, first, runtime):
            score(f"going-{ranks}", going, *whole, "--split", "val")
        other = ("--in_memory_binary_criteo_path", str(folder / "other days"), "--mmap_mode")
        score(f"other-{ranks}", folder / CASES[4].name, *whole, *other, "--batch_size=16", "--test_batch_size", "7")


@contextmanager
def removing(going: Path, checkpoints: Path, runtime: Runtime) -> Iterator[None]:
    """Has a copy of two checkpoints lose the newer one when it is about to be restored. Collective."""
    names = ("step_0000000004", "step_0000000006")
    on_main_rank(runtime, lambda: [str(shutil.copytree(checkpoints / name, going / name)) for name in names])

    def read_data(reader: Reader, *arguments: Any) -> Any:
        if runtime.is_main and (going / names[1]).exists():
            open_store(str(going)).remove(names[1])
        dist.barrier()
        return before(reader, *arguments)

    before, Reader.read_data = Reader.read_data, read_data
    try:
        yield
    finally:
        Reader.read_data = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all cases, and their scores on one and on two ranks."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_days(folder / "days", DAYS)
    write_days(folder / "other days", OTHER_DAYS)
    launch(work, 1, folder, 1, True, False, folder=folder)
    launch(work, 2, folder, 2, True, True, folder=folder)
    before = {path: path.stat().st_mtime_ns for case in CASES for path in (folder / case.name).rglob("*")}
    launch(work, 1, folder, 1, False, True, folder=folder)
    after = {path: path.stat().st_mtime_ns for case in CASES for path in (folder / case.name).rglob("*")}
    assert after == before, "scoring changes nothing of a run"
    return folder


def scores(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "scores" / f"{name}.json").read_text())


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(found[metric] == pytest.approx(expected[metric], rel=0, abs=1e-6) for metric in METRICS)


def last_of(run_dir: Path, kind: str, step: int) -> dict[str, Any]:
    return [line for line in read_metrics(run_dir) if line["kind"] == kind and line["step"] == step][-1]


@pytest.mark.parametrize(("case", "ranks"), [(case, ranks) for case, ranks, _ in SCORED])
def test_scores_are_those_of_training(case: Case, ranks: int, folder: Path) -> None:
    run_dir = folder / case.name
    steps = read_summary(run_dir)["num_train_steps"]
    found = scores(folder, f"{case.name}-{ranks}")
    assert same(found["val"], last_of(run_dir, "val", steps))
    assert same(found["test"], last_of(run_dir, "test", steps))
    assert found["checkpoint"].startswith(f"{run_dir}/checkpoints/step_{steps:010d}")
    assert (found["step"], found["world_size"], found["data_is_as_trained"]) == (steps, ranks, True)


@pytest.mark.parametrize("ranks", RANKS)
def test_an_older_checkpoint(ranks: int, folder: Path) -> None:
    found = scores(folder, f"step 4-{ranks}")
    assert same(found["val"], last_of(folder / CASES[0].name, "val", 4))
    assert "test" not in found


@pytest.mark.parametrize("ranks", RANKS)
def test_one_that_a_run_removes_while_it_is_read(ranks: int, folder: Path) -> None:
    found = scores(folder, f"going-{ranks}")
    assert found["checkpoint"] == f"{folder / f'going-{ranks}'}/step_0000000004"
    assert found["val"] == scores(folder, f"step 4-{ranks}")["val"]


def test_other_days(folder: Path) -> None:
    """With the checkpoint's statistics of the integers, not theirs."""
    found = scores(folder, "other-1")
    assert found["val"]["num_samples"] + found["test"]["num_samples"] == OTHER_DAYS[1]
    assert not found["data_is_as_trained"]
    for stage in ("val", "test"):
        assert same(scores(folder, "other-2")[stage], found[stage])
    assert not same(found["val"], scores(folder, f"{CASES[4].name}-1")["val"])
