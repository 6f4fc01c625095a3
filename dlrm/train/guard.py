"""The hooks of a run: where its checkpoints go, whether they are copied first, who listens to signals."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from dlrm.assembly.foundation import Foundation
from dlrm.checkpoint.checkpointer import Checkpointer, copies_fit, copy_bytes
from dlrm.checkpoint.store import open_store
from dlrm.fault_tolerance.hooks import RunHooks
from dlrm.fault_tolerance.watchdog import Watchdog
from dlrm.metrics.journal import Journal
from dlrm.ranks.runtime import on_main_rank
from dlrm.system.console import show_bytes
from dlrm.system.host import available_memory_bytes
from dlrm.system.signals import StopSignals
from dlrm.train.resume import Start, store_address
from dlrm.train.run_directory import RunDirectory

_SECONDS_TO_SETTLE = 60.0


@contextmanager
def open_hooks(
    base: Foundation, directory: RunDirectory, start: Start, signals: StopSignals, journal: Journal
) -> Iterator[RunHooks]:
    """Hooks that save a training while it runs. However it ends, a checkpoint on its way is waited for. Collective.

    Raises:
        CheckpointError: if a checkpoint can't be written.
    """
    config, runtime = base.config.checkpoint, base.runtime
    watchdog = Watchdog(runtime, config.hang_timeout)
    checkpointer = None
    every = base.config.checkpoint_interval
    if not every.is_never:
        own = start.source if start.is_own else None
        checkpointer = Checkpointer(
            open_store(on_main_rank(runtime, lambda: store_address(base.config, start.path))),
            runtime,
            config.keep,
            config.checkpoint_mode == "async" and _copies_fit(base),
            start.data,
            directory.documents,
            start.left_out,
            watchdog.note_written,
            last_step=None if own is None else start.position.step,
        )
    watchdog.start()
    try:
        with signals.saving() if checkpointer is not None else nullcontext():
            yield RunHooks(every, runtime, checkpointer, signals, watchdog, journal)
    finally:
        if checkpointer is not None:
            checkpointer.settle(_SECONDS_TO_SETTLE)
        watchdog.stop()


def _copies_fit(base: Foundation) -> bool:
    """Whether each rank has memory for a copy of what it saves; prints it if not. Collective."""
    runtime, state = base.runtime, base.state()
    local = runtime.local_world_size
    fit = copies_fit(state, runtime, available_memory_bytes(local) // local)
    if not fit and runtime.is_main:
        needed = show_bytes(copy_bytes(state, runtime))
        print(f"Checkpoints: no memory for a copy of {needed} a rank, so training waits while one is written.")
    return fit
