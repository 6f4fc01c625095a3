"""What keeps a training from being lost: checkpoints when they are due, signals, and a watch over ranks that hang."""

import time
from collections.abc import Iterator
from signal import Signals
from typing import TYPE_CHECKING, TypeVar

from dlrm.checkpoint.checkpointer import Checkpointer
from dlrm.checkpoint.state import State, count_state, training_state
from dlrm.config import CheckpointConfig
from dlrm.errors import CheckpointError, DatasetError
from dlrm.runtime import Runtime
from dlrm.signals import StopSignals
from dlrm.train.control import Agreement, Wish
from dlrm.train.watchdog import Watchdog

if TYPE_CHECKING:
    from dlrm.train.trainer import Trainer

T = TypeVar("T")

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


class Safety:
    """Called by the trainer where something may be due. This one does nothing."""

    def watched(self, batches: Iterator[T], doing: str) -> Iterator[T]:
        """The batches."""
        del doing
        return batches

    def after_step(self, trainer: "Trainer", *, before_validation: bool) -> None:
        """After each training step; `before_validation` if one is due now."""

    def after_validation(self, trainer: "Trainer", *, is_best: bool) -> None:
        """After each validation; `is_best` if its AUROC beats all before."""

    def within_evaluation(self, trainer: "Trainer") -> None:
        """After each batch of an evaluation."""

    def end_training(self, trainer: "Trainer") -> None:
        """After the last training step."""


class RunSafety(Safety):
    """Checkpoints, signals and watchdog of a run. Every rank has one."""

    def __init__(
        self,
        config: CheckpointConfig,
        runtime: Runtime,
        checkpointer: Checkpointer | None,
        signals: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self.checkpointer = checkpointer
        self._signals = signals
        self._watchdog = watchdog
        self._agreement = Agreement(runtime)
        self._is_due = False
        self._since = time.monotonic()

    def watched(self, batches: Iterator[T], doing: str) -> Iterator[T]:
        """See `Safety`."""
        while True:
            self._watchdog.beat("reading a batch")
            batch = next(batches, None)
            self._watchdog.beat(doing)
            if batch is None:
                return
            yield batch

    def after_step(self, trainer: "Trainer", *, before_validation: bool) -> None:
        """See `Safety`."""
        self._watchdog.beat("training")
        if self.checkpointer is None:
            return
        every = self._config.every_steps
        if every is not None and trainer.step % every == 0:
            self._is_due = True
        self._agree(trainer, self.checkpointer)
        if self._is_due and not before_validation:
            self._save(trainer, self.checkpointer)

    def after_validation(self, trainer: "Trainer", *, is_best: bool) -> None:
        """See `Safety`."""
        if self.checkpointer is not None and (is_best or self._is_due):
            self._save(trainer, self.checkpointer)

    def within_evaluation(self, trainer: "Trainer") -> None:
        """See `Safety`."""
        self._watchdog.beat("evaluating")
        if self.checkpointer is not None:
            self._agree(trainer, self.checkpointer)

    def end_training(self, trainer: "Trainer") -> None:
        """See `Safety`."""
        if self.checkpointer is not None and self.checkpointer.last_step != trainer.step:
            self._save(trainer, self.checkpointer)

    def close(self, trainer: "Trainer") -> None:
        """Waits for the last checkpoint.

        Raises:
            CheckpointError: if it can't be written.
        """
        if self.checkpointer is not None:
            self._watchdog.beat("writing a checkpoint")
            if not self.checkpointer.settle(_SECONDS_OF_SILENCE) and self._runtime.is_main:
                print(f"Writing the checkpoint of step {self.checkpointer.last_step:,} to its end.", flush=True)
            self.checkpointer.finish()
            self._report(trainer, self.checkpointer)

    def save_after(self, error: DatasetError, trainer: "Trainer") -> DatasetError:
        """Saves what training has reached before rows turned out to be wrong; gives the error that says so.

        One of several ranks can't save: the others wait in the step that it did not take.
        """
        if self.checkpointer is None or trainer.step == 0:
            return error
        if self._runtime.world_size > 1:
            last = self.checkpointer.last_step
            kept = "no checkpoint yet" if last is None else f"the last checkpoint is of step {last:,}"
            return DatasetError(f"{error} One of several ranks can't save alone: {kept}.")
        try:
            if self.checkpointer.last_step != trainer.step:
                self._save(trainer, self.checkpointer, wait=True)
            self.checkpointer.finish()
        except CheckpointError as failure:
            return DatasetError(f"{error} What was reached is not saved: {failure}")
        return DatasetError(f"{error} Training up to step {trainer.step:,} is saved.")

    def _wish(self, checkpointer: Checkpointer) -> Wish:
        if checkpointer.has_failed:
            return Wish.FAIL
        if self._signals.received is not None:
            return Wish[self._signals.received.name]
        seconds = self._config.every_seconds
        is_due = self._runtime.is_main and seconds is not None and time.monotonic() - self._since >= seconds
        return Wish.SAVE if is_due and not self._is_due else Wish.GO_ON

    def _agree(self, trainer: "Trainer", checkpointer: Checkpointer) -> None:
        self._report(trainer, checkpointer)
        agreed = self._agreement.reach(self._wish(checkpointer))
        if agreed is Wish.SAVE:
            self._is_due = True
        elif agreed is Wish.FAIL:
            checkpointer.finish()
            raise CheckpointError("a checkpoint could not be written; another rank says why")
        elif agreed is not Wish.GO_ON:
            if checkpointer.last_step != trainer.step:
                self._save(trainer, checkpointer, wait=True)
            checkpointer.finish()
            raise Stopped(Signals[agreed.name], trainer.step)

    def _save(self, trainer: "Trainer", checkpointer: Checkpointer, *, wait: bool = False) -> None:
        self._watchdog.beat("saving a checkpoint")
        position = trainer.position()
        validated = trainer.validated_step == trainer.step and trainer.val_results
        auroc = trainer.val_results[-1].auroc if validated else None
        checkpointer.save(state_of(trainer), position, auroc, wait=wait)
        self._is_due = False
        self._since = time.monotonic()
        self._report(trainer, checkpointer)

    def _report(self, trainer: "Trainer", checkpointer: Checkpointer) -> None:
        for saved in checkpointer.drain():
            trainer.write(
                "checkpoint",
                saved_step=saved.step,
                stall_seconds=saved.stall_seconds,
                write_seconds=saved.write_seconds,
                num_bytes=saved.num_bytes,
            )


def state_of(trainer: "Trainer") -> State:
    """All tensors of a training. Collective."""
    state = training_state(trainer.model, trainer.optimizer, trainer.runtime)
    frequencies = trainer.splits["train"].frequencies
    return (
        state if frequencies is None else {**state, **count_state(frequencies.total(trainer.runtime), trainer.runtime)}
    )
