"""Where a run begins that was started from a checkpoint."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dlrm.checkpoint.position import Position
from dlrm.config.config import OptimizerConfig
from dlrm.errors import CheckpointError
from dlrm.train.resume import Start, _check_schedule

DECAY = OptimizerConfig(lr_decay_start=50, lr_decay_steps=50)


def start_at(step: int, data: str) -> Start:
    manifest = SimpleNamespace(position=Position(step=step).to_json(), data="old")
    return Start(Path("run"), data, cast(Any, SimpleNamespace(manifest=manifest)))


def test_new_data_after_the_learning_rate_has_decayed_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"at step 100, and its learning rate's decay ended at step 100"):
        _check_schedule(start_at(100, "new"), DECAY)


@pytest.mark.parametrize(
    ("step", "data", "optimizer"), [(99, "new", DECAY), (100, "old", DECAY), (100, "new", OptimizerConfig())]
)
def test_else_it_is_trained_on(step: int, data: str, optimizer: OptimizerConfig) -> None:
    _check_schedule(start_at(step, data), optimizer)
