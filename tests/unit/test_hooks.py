"""The end of a run that has a checkpoint to write."""

from dataclasses import replace
from typing import cast

import pytest
import torch

from dlrm.checkpoint.checkpointer import Checkpointer, Saved
from dlrm.checkpoint.position import Position
from dlrm.config.interval import Interval
from dlrm.errors import DatasetError
from dlrm.fault_tolerance import hooks as hooks_module
from dlrm.fault_tolerance.hooks import RunHooks
from dlrm.fault_tolerance.watchdog import Watchdog
from dlrm.metrics.journal import Journal
from dlrm.metrics.sinks import Sinks
from dlrm.ranks.runtime import Runtime
from dlrm.system.signals import StopSignals

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


def hooks_of(runtime: Runtime, writer: Writer) -> RunHooks:
    watchdog = Watchdog(ALONE, timeout=0.0)
    checkpointer = cast("Checkpointer", writer)
    return RunHooks(Interval("never"), runtime, checkpointer, StopSignals(), watchdog, Journal(Sinks([])))


@pytest.mark.parametrize(
    ("settles", "said"), [(False, "Writing the checkpoint of step 1,234 to its end.\n"), (True, "")]
)
def test_what_takes_long_at_the_end_is_said(settles: bool, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer(settles=settles)
    hooks_of(ALONE, writer).close(Position())
    assert writer.finished
    assert capsys.readouterr().out == said


def test_one_of_several_ranks_that_meets_a_wrong_row_says_what_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks_module, "Agreement", lambda _: None)
    hooks = hooks_of(replace(ALONE, world_size=2), Writer(settles=True))
    error = hooks.after_bad_rows(DatasetError("day_0: id -1 at row 7."), Position(step=2000), lambda: ({}, Position()))
    last = "One of several ranks can't save alone: the last checkpoint is of step 1,234."
    assert str(error) == f"day_0: id -1 at row 7. {last}"
