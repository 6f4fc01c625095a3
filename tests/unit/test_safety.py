"""The end of a run that has a checkpoint to write."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dlrm.checkpoint.checkpointer import Checkpointer, Saved
from dlrm.config import CheckpointConfig
from dlrm.errors import DatasetError
from dlrm.runtime import Runtime
from dlrm.signals import StopSignals
from dlrm.train import safety as safety_module
from dlrm.train.safety import RunSafety
from dlrm.train.watchdog import Watchdog

ALONE = Runtime(0, 0, 1, 1, torch.device("cpu"))


class Writer:
    """A checkpointer that is at work, or done."""

    last_step = 1234

    def __init__(self, *, settles: bool) -> None:
        self._settles = settles
        self.finished = False

    def settle(self, _: float) -> bool:
        return self._settles

    def finish(self) -> None:
        self.finished = True

    def drain(self) -> list[Saved]:
        return []


@pytest.mark.parametrize(
    ("settles", "said"), [(False, "Writing the checkpoint of step 1,234 to its end.\n"), (True, "")]
)
def test_what_takes_long_at_the_end_is_said(settles: bool, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(settles=settles)
    safety = RunSafety(
        CheckpointConfig(), ALONE, cast("Checkpointer", writer), StopSignals(), Watchdog(ALONE, timeout=0.0)
    )
    safety.close(cast("Any", None))
    assert writer.finished
    assert capsys.readouterr().out == said


def test_one_of_several_ranks_that_meets_a_wrong_row_says_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safety_module, "Agreement", lambda _: None)
    writer = cast("Checkpointer", Writer(settles=True))
    watchdog = Watchdog(ALONE, timeout=0.0)
    safety = RunSafety(CheckpointConfig(), replace(ALONE, world_size=2), writer, StopSignals(), watchdog)
    trainer = cast("Any", SimpleNamespace(step=2000))
    error = safety.save_after(DatasetError("day_0: id -1 at row 7."), trainer)
    last = "One of several ranks can't save alone: the last checkpoint is of step 1,234."
    assert str(error) == f"day_0: id -1 at row 7. {last}"
