"""The two sides of `dlrm bench checkpoint`: our trainer, which saves while it trains, and torch.save."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dlrm.bench.harness.flags import WARM_UP_STEPS
from dlrm.bench.harness.our_side import describe, lay_timed_foundation
from dlrm.bench.harness.plain_side import build_optimizer, build_reference, shard_reference
from dlrm.bench.harness.workers import Turns
from dlrm.checkpoint import run_files
from dlrm.checkpoint.checkpointer import Checkpointer, Saved
from dlrm.checkpoint.find import Location
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.restore import find_on_ranks
from dlrm.checkpoint.store import open_store
from dlrm.checkpoint.tensors import State, blocks, training_state
from dlrm.config.config import Config
from dlrm.fault_tolerance.hooks import Hooks, Snapshot
from dlrm.metrics.journal import Journal
from dlrm.metrics.sinks import Sinks
from dlrm.ranks.runtime import Runtime, on_main_rank, start_runtime
from dlrm.train.resume import restore_training
from dlrm.train.trainer import Trainer

ENDLESS = 2**30
"""Steps of an epoch that no turn reaches the end of."""


@contextmanager
def open_ours(config: Config, steps: int, folder: str) -> Iterator[Turns]:
    """Our side's turns: `train_and_save`, `save` with training waiting, `load` as a run that resumes does.

    The run's first save, whose copy takes fresh memory, is timed by itself at the start of the first turn.
    """
    address = str(Path(folder, "ours"))
    with start_runtime() as runtime:
        on_main_rank(runtime, lambda: shutil.rmtree(address, ignore_errors=True))  # of processes before these
        foundation, _ = lay_timed_foundation(config, runtime)
        documents = {run_files.CONFIG: json.dumps(config.to_json()).encode(), run_files.METRICS: b""}
        checkpointer = Checkpointer(open_store(address), runtime, 1, True, None, lambda: documents)
        facts: dict[str, float] = {}
        position = Position()

        def train() -> dict[str, Any]:
            nonlocal position
            if not facts:
                facts["first_stall_seconds"] = save_now(checkpointer, foundation.state(), position)
                checkpointer.finish()
                facts["saved_bytes"] = checkpointer.drain()[0].num_bytes
            hooks = _SavesOnce(checkpointer, runtime, steps)
            trainer = Trainer(foundation, Journal(Sinks([])), position, hooks)
            with suppress(_CompleteError):
                trainer.train()
            _, position = trainer.snapshot()
            return hooks.times()

        def load() -> dict[str, float]:
            started = time.perf_counter()
            source = find_on_ranks(Location(address), runtime, lambda *_: None, print)
            checked = time.perf_counter()
            restore_training(foundation, source, Position.from_json(source.manifest.position))
            return {"check": checked - started, "restore": time.perf_counter() - checked}

        yield {
            "train_and_save": train,
            "save": lambda: save_now(checkpointer, foundation.state(), position, wait=True),
            "load": load,
            "describe": lambda: {**describe(foundation.model, config.optimizer), **facts},
        }


def save_now(checkpointer: Checkpointer, state: State, position: Position, *, wait: bool = False) -> float:
    """Saves as a run does after a step; seconds for which that step's end stands still. Collective."""
    started = time.perf_counter()
    checkpointer.save(state, position, None, wait=wait)
    return time.perf_counter() - started


class _CompleteError(Exception):
    """The checkpoint is complete: enough training."""


class _SavesOnce(Hooks):
    """Saves after some steps, and ends training when the checkpoint is complete on all ranks."""

    def __init__(self, checkpointer: Checkpointer, runtime: Runtime, steps: int) -> None:
        checkpointer.drain()
        self._checkpointer, self._runtime = checkpointer, runtime
        self._num_quiet = WARM_UP_STEPS + steps
        self._quiet: list[float] = []
        self._writing: list[float] = []
        self._stall = 0.0
        self._saved: Saved | None = None
        self._since = time.perf_counter()

    def after_step(self, position: Position, snapshot: Snapshot, *, before_validation: bool) -> None:
        """See `Hooks`."""
        del position, before_validation
        is_writing = len(self._quiet) == self._num_quiet
        (self._writing if is_writing else self._quiet).append(time.perf_counter() - self._since)
        if is_writing and self._is_complete():
            raise _CompleteError
        if not is_writing and len(self._quiet) == self._num_quiet:
            started = time.perf_counter()
            save_now(self._checkpointer, *snapshot())
            self._stall = time.perf_counter() - started
        self._since = time.perf_counter()

    def times(self) -> dict[str, Any]:
        """Seconds: `stall`; `complete`, from the call to the end of the writing; `quiet_steps` without a checkpoint
        being written, `writing_steps` with."""
        assert self._saved is not None
        return {
            "stall": self._stall,
            "complete": self._stall + self._saved.write_seconds,
            "quiet_steps": self._quiet[WARM_UP_STEPS:],
            "writing_steps": self._writing,
        }

    def _is_complete(self) -> bool:
        if self._checkpointer.has_failed:
            self._checkpointer.finish()
        self._saved = self._saved or next(iter(self._checkpointer.drain()), None)
        complete = torch.tensor(self._saved is not None, dtype=torch.int32)
        if self._runtime.world_size > 1:
            dist.all_reduce(complete, op=dist.ReduceOp.MIN, group=self._runtime.control_group)
        return bool(complete)


@contextmanager
def open_torch_save(config: Config, folder: str) -> Iterator[Turns]:
    """The other side's turns: torch.save of all that a plain TorchRec loop's ranks hold, each into its own file."""
    device = torch.device("cpu")
    sharded = shard_reference(build_reference(config.model, device), config, device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    runtime = Runtime(rank, rank, world_size, world_size, device)
    module = hold_tensors(sharded, build_optimizer(sharded, config.optimizer), runtime)
    path = Path(folder, f"torch_save_rank{rank}.pt")

    def save() -> dict[str, float]:
        started = time.perf_counter()
        torch.save(module.state_dict(), path)
        dist.barrier()
        written = time.perf_counter()
        with path.open("rb") as file:
            os.fsync(file.fileno())
        dist.barrier()
        return {"written": written - started, "synced": time.perf_counter() - started}

    def load() -> float:
        started = time.perf_counter()
        module.load_state_dict(torch.load(path, weights_only=True))
        dist.barrier()
        return time.perf_counter() - started

    def describe_torch() -> dict[str, float]:
        return {**describe(sharded, config.optimizer), "saved_bytes": path.stat().st_size}

    save()
    yield {"save": save, "load": load, "describe": describe_torch}


def hold_tensors(model: Any, optimizer: Any, runtime: Runtime) -> nn.Module:
    """A module whose state_dict is what this rank saves of a training, as views. Collective."""
    state = training_state(model, optimizer, runtime)
    module = nn.Module()
    for name, part in blocks({name: parts.saved_by(runtime.rank) for name, parts in state.items()}):
        module.register_buffer(f"{name} {part.offsets}".replace(".", "/"), part.tensor)
    return module
