"""Saves a training: copies its state after a step, writes the copy during the next steps, removes old checkpoints.

training    step 9 | step 10 | copy |  step 11  |  step 12  |  step 13  | copy ...
thread                              |  write step_0000000010  | remove old ones |
"""

import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException, save

from dlrm.checkpoint.dcp import ShardPlanner, Writer
from dlrm.checkpoint.find import best_of, complete_checkpoints
from dlrm.checkpoint.manifest import File, Manifest, Tensor
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.store import Store
from dlrm.checkpoint.tensors import Part, State, blocks
from dlrm.errors import CheckpointError, reason_of
from dlrm.ranks.runtime import Runtime, new_gloo_group, on_main_rank
from dlrm.system.host import give_way


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        stall_seconds: how long training waited, on this rank.
        write_seconds: how long writing took, on this rank.
        num_bytes: bytes that this rank wrote; on rank 0 those of the whole checkpoint.
    """

    step: int
    stall_seconds: float
    write_seconds: float
    num_bytes: int


class Checkpointer:
    """Writes checkpoints of one training. Every rank has one, and calls the same methods in the same order.

    At most one checkpoint is being written; the next one waits for it.

    Attributes:
        copies: whether training continues while a checkpoint is written.
        last_step: the step of the newest checkpoint, even if it is still being written.
    """

    def __init__(
        self,
        store: Store,
        runtime: Runtime,
        keep: int,
        copies: bool,
        data: str | None,
        documents: Callable[[], Mapping[str, bytes]],
        left_out: Collection[str] = (),
        note_written: Callable[[], None] = lambda: None,
        last_step: int | None = None,
    ) -> None:
        """Removes leftovers of interrupted saves. Collective.

        Args:
            keep: how many of the newest checkpoints stay.
            copies: whether to copy tensors first, so that training continues while they are written.
            data: digest of the data; None for random data.
            documents: returns, on rank 0, small files that a checkpoint holds too.
            left_out: names of checkpoints in the store that this training does not continue from. They are neither
                counted nor removed.
            note_written: called after each block that is written, from any thread.
            last_step: the step of the newest checkpoint of this training in the store.

        Raises:
            CheckpointError: if the store can't be listed, or leftovers can't be removed.
        """
        self._store, self._runtime, self._keep = store, runtime, keep
        self.copies = copies
        self._data, self._documents = data, documents
        self._left_out, self._note_written = frozenset(left_out), note_written
        self._group = new_gloo_group()  # collectives of another thread need a group of their own
        self._token = on_main_rank(runtime, lambda: secrets.token_hex(4))
        self._copied: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | RuntimeError | None = None
        self._saved: list[Saved] = []
        self.last_step = last_step
        self._complete_step: int | None = None
        on_main_rank(runtime, self._remove_leftovers)

    def save(self, state: State, position: Position, val_auroc: float | None, *, wait: bool = False) -> float:
        """Saves a training; returns the seconds for which it waited. Collective.

        Args:
            val_auroc: the AUROC of the validation after this step; None if there was none.
            wait: whether to return only when the checkpoint is complete.

        Raises:
            CheckpointError: if this checkpoint or the one before it can't be written.
        """
        started = time.perf_counter()
        self.finish()
        own = _saved_here(state, self._runtime)
        writer = Writer(
            self._store,
            position.step,
            self._token,
            self._runtime.rank,
            self._documents() if self._runtime.is_main else {},
            partial(self._describe, position, val_auroc),
            self._note_written,
        )
        self.last_step = position.step
        if self.copies and not wait:
            own = self._copy(own)
            stall = time.perf_counter() - started
            self._thread = threading.Thread(
                target=self._write_aside, args=(own, writer, stall), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(own, writer, None)
            self._raise()
        return time.perf_counter() - started

    def finish(self) -> None:
        """Waits for the checkpoint that is being written.

        Raises:
            CheckpointError: if it can't be written.
            RuntimeError: if another rank is gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._error is None and self._complete_step != self.last_step:
                raise CheckpointError(f"{self._store.address}: the thread that writes ended. Its traceback is above.")
        self._raise()

    def settle(self, seconds: float) -> bool:
        """Waits up to `seconds` for the checkpoint that is being written; returns whether it ended. Raises nothing."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written. Ranks may see this at different moments."""
        return self._error is not None

    def drain(self) -> list[Saved]:
        """The checkpoints completed since the last call."""
        saved = []
        while self._saved:  # the checkpoint's thread may append one meanwhile
            saved.append(self._saved.pop(0))
        return saved

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _copy(self, state: State) -> State:
        """Copies tensors to host memory, which is kept and used again for the next checkpoint."""
        copied = {
            name: replace(parts, parts=tuple(Part(part.offsets, self._copy_part(name, part)) for part in parts.parts))
            for name, parts in state.items()
        }
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize(self._runtime.device)
        return copied

    def _copy_part(self, name: str, part: Part) -> torch.Tensor:
        key = name, part.offsets
        if key not in self._copied:
            pinned = part.tensor.device.type == "cuda"
            self._copied[key] = torch.empty(part.tensor.shape, dtype=part.tensor.dtype, pin_memory=pinned)
        return self._copied[key].copy_(part.tensor, non_blocking=True)

    def _write_aside(self, state: State, writer: Writer, stall: float) -> None:
        """Runs on the checkpoint's thread, with low priority: on a CPU, training needs the same cores."""
        give_way()
        self._write(state, writer, stall)

    def _write(self, state: State, writer: Writer, stall: float | None) -> None:
        """Writes a checkpoint. If one rank fails, DCP raises the error on every rank.

        Args:
            stall: seconds for which training waited for the copy; None if it waits for all of the writing.
        """
        started = time.perf_counter()
        try:
            save(
                dict(state),
                storage_writer=writer,
                planner=ShardPlanner(),
                process_group=self._group,
            )
        except CheckpointException as error:
            self._error = _explain(self._store, error)
            if self._runtime.is_main:
                with suppress(OSError):
                    writer.discard()
            return
        except RuntimeError as error:  # another rank is gone; the launcher says which
            self._error = error
            return
        if self._runtime.is_main:
            self._prune()
        seconds = time.perf_counter() - started
        self._complete_step = self.last_step
        self._saved.append(Saved(self.last_step or 0, stall or seconds, seconds, writer.num_bytes))

    def _describe(
        self, position: Position, val_auroc: float | None, files: Mapping[str, File], tensors: Mapping[str, Tensor]
    ) -> Manifest:
        created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        return Manifest(
            position.step, created, self._runtime.world_size, val_auroc, position.to_json(), self._data, files, tensors
        )

    def _prune(self) -> None:
        """Removes all but the newest checkpoints and the best one. If one can't be removed, a line says so."""
        try:
            there = [found for found in complete_checkpoints(self._store) if found.name not in self._left_out]
        except CheckpointError as error:
            print(f"{error}: old checkpoints stay.")
            return
        # On other data a score means another thing.
        best = best_of([found for found in there if found.manifest.data == self._data])
        for found in there[self._keep :]:
            if found.name != best:
                try:
                    self._store.remove(found.name)
                except OSError as error:
                    print(f"{found.address}: an old checkpoint that can't be removed ({reason_of(error)}).")

    def _remove_leftovers(self) -> None:
        try:
            for name in self._store.leftovers():
                self._store.remove(name)
        except OSError as error:
            raise _unwritable(self._store, "", error) from None


def copies_fit(state: State, runtime: Runtime, available_bytes: int) -> bool:
    """Whether every rank has host memory for a copy of what it saves. Collective.

    Args:
        available_bytes: the memory that this rank may use.
    """
    fits = torch.tensor(copy_bytes(state, runtime) <= available_bytes, dtype=torch.int32)
    if runtime.world_size > 1:
        dist.all_reduce(fits, op=dist.ReduceOp.MIN, group=runtime.control_group)
    return bool(fits)


def copy_bytes(state: State, runtime: Runtime) -> int:
    """Bytes of the tensors that this rank saves."""
    return sum(part.tensor.nbytes for _, part in blocks(_saved_here(state, runtime)))


def _saved_here(state: State, runtime: Runtime) -> State:
    return {name: parts.saved_by(runtime.rank) for name, parts in state.items()}


def _explain(store: Store, error: CheckpointException) -> CheckpointError:
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, OSError):
        explained = _unwritable(store, f" (rank {rank})" if len(error.failures) > 1 else "", cause)
    else:
        explained = CheckpointError(f"{store.address}: {' '.join(str(cause).split()) or type(cause).__name__}")
    return explained.raised_everywhere()


def _unwritable(store: Store, who: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{store.address}{who}: can't be written ({reason_of(error)}). Earlier checkpoints are as they were. "
        "Make room or fix what is wrong, and start the same command again: it continues from the newest."
    )
