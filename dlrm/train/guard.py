"""A run's safety, put together: where checkpoints go, whether they are copied first, who listens to signals."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from dlrm.checkpoint.checkpointer import Checkpointer, copies_fit, copy_bytes
from dlrm.checkpoint.store import open_store
from dlrm.console import show_bytes
from dlrm.errors import DatasetError
from dlrm.host import available_memory_bytes
from dlrm.runtime import on_main_rank
from dlrm.signals import StopSignals
from dlrm.train.resume import Start, store_address
from dlrm.train.run_directory import RunDirectory
from dlrm.train.safety import RunSafety, state_of
from dlrm.train.trainer import Trainer
from dlrm.train.watchdog import Watchdog

_SECONDS_TO_SETTLE = 60.0


@contextmanager
def guard(trainer: Trainer, directory: RunDirectory, start: Start, signals: StopSignals) -> Iterator[RunSafety]:
    """Saves a training while it runs, and waits for the last checkpoint. Collective.

    Raises:
        CheckpointError: if a checkpoint can't be written.
        DatasetError: that ended training; what it had reached is saved if there is one rank.
    """
    config, runtime = trainer.config.checkpoint, trainer.runtime
    checkpointer, watchdog = None, Watchdog(runtime, config.hang_timeout)
    if config.checkpoint_every != "never":
        copies = config.checkpoint_mode == "async"
        if copies:
            state = state_of(trainer)
            local = runtime.local_world_size
            copies = copies_fit(state, runtime, available_memory_bytes(local) // local)
            if not copies and runtime.is_main:
                needed = show_bytes(copy_bytes(state, runtime))
                print(f"Checkpoints: no memory for a copy of {needed} a rank, so training waits while one is written.")
        address = on_main_rank(runtime, lambda: store_address(trainer.config, start.path))
        own = start.source if start.is_own else None
        checkpointer = Checkpointer(
            open_store(address),
            runtime,
            config.keep,
            copies,
            start.data,
            directory.documents,
            own.left_out if own is not None else (),
            watchdog.note_written,
        )
        checkpointer.last_step = trainer.step if own is not None else None
    watchdog.start()
    safety = RunSafety(config, runtime, checkpointer, signals, watchdog)
    try:
        with signals.saving() if checkpointer is not None else nullcontext():
            try:
                yield safety
            except DatasetError as error:
                raise safety.save_after(error, trainer) from None
            safety.close(trainer)
    finally:
        if checkpointer is not None:
            checkpointer.settle(_SECONDS_TO_SETTLE)
        watchdog.stop()
