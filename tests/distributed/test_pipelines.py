"""Every pipeline computes the same numbers; they differ in what overlaps."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlrm.assembly.pipeline import PipelineName
from dlrm.config.config import Config
from dlrm.ranks.runtime import start_runtime
from tests.distributed.test_parity import Case, train_losses
from tests.launching import TINY, launch, run_main

STEPS = 20
NAMES: tuple[PipelineName, ...] = ("sparse_dist", "base")


def config_of(name: PipelineName, ranks: int) -> Config:
    """Validates within epochs, so that each pipeline runs dry and starts again."""
    config = Case("table_wise", "adagrad").config(ranks)
    return replace(
        config,
        training=replace(config.training, pipeline=name, epochs=2),
        evaluation=replace(config.evaluation, validation_freq_within_epoch=8),
    )


def losses_of_all(ranks: int) -> dict[str, list[float]]:
    """Runs in a worker."""
    torch.set_num_threads(1)
    with start_runtime():
        return {name: train_losses(config_of(name, ranks)) for name in NAMES}


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_the_same_to_the_bit(tmp_path: Path, ranks: int) -> None:
    losses = launch(losses_of_all, ranks, ranks, folder=tmp_path)[0]
    # each step reports, each epoch validates three times, and there is a test
    assert len(losses["sparse_dist"]) == 2 * (STEPS + 3) + 1
    assert losses["base"] == losses["sparse_dist"]
    assert losses["base"][0] != losses["base"][-1]


def test_base_trains_validates_and_tests(tmp_path: Path) -> None:
    done = run_main(*TINY, "--pipeline", "base", "--run_dir", str(tmp_path / "run"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "AUROC over val set" in done.stdout
    assert "AUROC over test set" in done.stdout


def test_prefetch_without_a_gpu_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run_main(*TINY, "--pipeline", "prefetch", "--run_dir", str(tmp_path / "run"), ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("dlrm: error") == 1
    assert "--pipeline prefetch: expected a CUDA device, got cpu" in done.stderr
    assert not (tmp_path / "run").exists()
