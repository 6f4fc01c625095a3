"""What keeps a training from being lost: checkpoints when they are due, signals, and a watch over ranks that hang.

Hooks are told where training stands, and take a snapshot of it if something is due. They know nothing else of it.
"""

import time
from collections.abc import Callable, Iterator
from signal import Signals
from typing import TypeVar

from dlrm.checkpoint.checkpointer import Checkpointer
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.tensors import State
from dlrm.config.interval import Interval
from dlrm.errors import CheckpointError, DatasetError
from dlrm.fault_tolerance.agreement import Agreement, Wish
from dlrm.fault_tolerance.watchdog import Watchdog
from dlrm.metrics.journal import Journal
from dlrm.ranks.runtime import Runtime
from dlrm.system.signals import StopSignals

T = TypeVar("T")
Snapshot = Callable[[], tuple[State, Position]]
"""Gives all of a training's state, as views of its tensors. Collective."""

_SECONDS_OF_SILENCE = 2.0


class Stopped(Exception):  # noqa: N818 - no error
    """A signal has ended the run; what it had reached is saved.

    Attributes:
        number: the signal.
        step: the step that the newest checkpoint is of.
    """

    def __init__(self, number: Signals, step: int) -> None:
        super().__init__(f"{number.name} at step {step}")
        self.number, self.step = number, step


class Hooks:
    """Calls of a trainer at points where its state is consistent. This base class ignores them."""

    def watched(self, batches: Iterator[T], doing: str) -> Iterator[T]:
        """The batches."""
        del doing
        return batches

    def after_step(self, position: Position, snapshot: Snapshot, *, before_validation: bool) -> None:
        """After each training step; `before_validation` if one is due now."""

    def after_validation(self, position: Position, snapshot: Snapshot, *, is_best: bool) -> None:
        """After each validation; `is_best` if its AUROC beats all before."""

    def within_evaluation(self, position: Position, snapshot: Snapshot) -> None:
        """After each batch of an evaluation."""

    def end_training(self, position: Position, snapshot: Snapshot) -> None:
        """After the last training step."""

    def after_bad_rows(self, error: DatasetError, position: Position, snapshot: Snapshot) -> DatasetError:
        """After rows that turned out to be wrong ended training; gives the error to raise."""
        del position, snapshot
        return error


class RunHooks(Hooks):
    """Checkpoints, signals and watchdog of a run. Every rank has them."""

    def __init__(
        self,
        every: Interval,
        runtime: Runtime,
        checkpointer: Checkpointer | None,
        signals: StopSignals,
        watchdog: Watchdog,
        journal: Journal,
    ) -> None:
        self._every = every
        self._runtime = runtime
        self._checkpointer = checkpointer
        self._signals = signals
        self._watchdog = watchdog
        self._journal = journal
        self._agreement = Agreement(runtime)
        self._is_due = False
        self._since = time.monotonic()

    def watched(self, batches: Iterator[T], doing: str) -> Iterator[T]:
        """See `Hooks`."""
        while True:
            self._watchdog.beat("reading a batch")
            batch = next(batches, None)
            self._watchdog.beat(doing)
            if batch is None:
                return
            yield batch

    def after_step(self, position: Position, snapshot: Snapshot, *, before_validation: bool) -> None:
        """See `Hooks`."""
        self._watchdog.beat("training")
        if self._checkpointer is None:
            return
        steps = self._every.steps
        if steps is not None and position.step % steps == 0:
            self._is_due = True
        self._agree(self._checkpointer, position, snapshot)
        if self._is_due and not before_validation:
            self._save(self._checkpointer, snapshot)

    def after_validation(self, position: Position, snapshot: Snapshot, *, is_best: bool) -> None:
        """See `Hooks`."""
        del position
        if self._checkpointer is not None and (is_best or self._is_due):
            self._save(self._checkpointer, snapshot)

    def within_evaluation(self, position: Position, snapshot: Snapshot) -> None:
        """See `Hooks`."""
        self._watchdog.beat("evaluating")
        if self._checkpointer is not None:
            self._agree(self._checkpointer, position, snapshot)

    def end_training(self, position: Position, snapshot: Snapshot) -> None:
        """See `Hooks`."""
        if self._checkpointer is not None and self._checkpointer.last_step != position.step:
            self._save(self._checkpointer, snapshot)

    def after_bad_rows(self, error: DatasetError, position: Position, snapshot: Snapshot) -> DatasetError:
        """See `Hooks`. One of several ranks can't save: the others wait in the step that it did not take."""
        if self._checkpointer is None or position.step == 0:
            return error
        if self._runtime.world_size > 1:
            last = self._checkpointer.last_step
            kept = "no checkpoint yet" if last is None else f"the last checkpoint is of step {last:,}"
            return DatasetError(f"{error} One of several ranks can't save alone: {kept}.")
        try:
            if self._checkpointer.last_step != position.step:
                self._save(self._checkpointer, snapshot, wait=True)
            self._checkpointer.finish()
        except CheckpointError as failure:
            return DatasetError(f"{error} What was reached is not saved: {failure}")
        return DatasetError(f"{error} Training up to step {position.step:,} is saved.")

    def close(self, position: Position) -> None:
        """Waits for the last checkpoint.

        Raises:
            CheckpointError: if it can't be written.
        """
        if self._checkpointer is not None:
            self._watchdog.beat("writing a checkpoint")
            if not self._checkpointer.settle(_SECONDS_OF_SILENCE) and self._runtime.is_main:
                print(f"Writing the checkpoint of step {self._checkpointer.last_step:,} to its end.", flush=True)
            self._checkpointer.finish()
            self._report(self._checkpointer, position)

    def _wish(self, checkpointer: Checkpointer) -> Wish:
        if checkpointer.has_failed:
            return Wish.FAIL
        if self._signals.received is not None:
            return Wish[self._signals.received.name]
        seconds = self._every.seconds
        is_due = self._runtime.is_main and seconds is not None and time.monotonic() - self._since >= seconds
        return Wish.SAVE if is_due and not self._is_due else Wish.GO_ON

    def _agree(self, checkpointer: Checkpointer, position: Position, snapshot: Snapshot) -> None:
        self._report(checkpointer, position)
        agreed = self._agreement.reach(self._wish(checkpointer))
        if agreed is Wish.SAVE:
            self._is_due = True
        elif agreed is Wish.FAIL:
            checkpointer.finish()
            raise CheckpointError("a checkpoint could not be written; another rank says why")
        elif agreed is not Wish.GO_ON:
            if checkpointer.last_step != position.step:
                self._save(checkpointer, snapshot, wait=True)
            checkpointer.finish()
            raise Stopped(Signals[agreed.name], position.step)

    def _save(self, checkpointer: Checkpointer, snapshot: Snapshot, *, wait: bool = False) -> None:
        self._watchdog.beat("saving a checkpoint")
        state, position = snapshot()
        checkpointer.save(state, position, position.step_auroc, wait=wait)
        self._is_due = False
        self._since = time.monotonic()
        self._report(checkpointer, position)

    def _report(self, checkpointer: Checkpointer, position: Position) -> None:
        for saved in checkpointer.drain():
            self._journal.write(
                "checkpoint",
                position,
                saved_step=saved.step,
                stall_seconds=saved.stall_seconds,
                write_seconds=saved.write_seconds,
                num_bytes=saved.num_bytes,
            )
