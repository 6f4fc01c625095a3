"""The two sides of `dlrm bench checkpoint`: our trainer, which saves while it trains, and torch.save."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dlrm.bench.config import WARM_UP_STEPS
from dlrm.bench.ours import build_trainer, describe
from dlrm.bench.reference import build_optimizer, build_reference, shard_reference
from dlrm.bench.workers import Turns
from dlrm.checkpoint.checkpointer import Checkpointer, Saved
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.restore import find_newest
from dlrm.checkpoint.state import blocks, training_state
from dlrm.checkpoint.store import open_store
from dlrm.config import Config
from dlrm.runtime import Runtime, on_main_rank, start_runtime
from dlrm.train.resume import resume_training
from dlrm.train.safety import Safety, state_of
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
        trainer = build_trainer(config, runtime)
        documents = {"config.json": json.dumps(config.to_json()).encode(), "metrics.jsonl": b""}
        checkpointer = Checkpointer(open_store(address), runtime, 1, True, None, lambda: documents)
        facts: dict[str, float] = {}

        def train() -> dict[str, Any]:
            if not facts:
                facts["first_stall_seconds"] = save_now(trainer, checkpointer)
                checkpointer.finish()
                facts["saved_bytes"] = checkpointer.drain()[0].num_bytes
            return train_and_save(trainer, checkpointer, steps)

        def load() -> dict[str, float]:
            started = time.perf_counter()
            source = find_newest(address, runtime, lambda *_: None, print)
            checked = time.perf_counter()
            assert source is not None
            resume_training(trainer, source, Position.from_json(source.manifest.position), runtime)
            return {"check": checked - started, "restore": time.perf_counter() - checked}

        yield {
            "train_and_save": train,
            "save": lambda: save_now(trainer, checkpointer, wait=True),
            "load": load,
            "describe": lambda: {**describe(trainer.model, config.optimizer), **facts},
        }


def save_now(trainer: Trainer, checkpointer: Checkpointer, *, wait: bool = False) -> float:
    """Saves as a run does after a step; seconds for which that step's end stands still. Collective."""
    started = time.perf_counter()
    position = trainer.position()
    checkpointer.save(state_of(trainer), position, None, wait=wait)
    return time.perf_counter() - started


def train_and_save(trainer: Trainer, checkpointer: Checkpointer, steps: int) -> dict[str, Any]:
    """Trains for so many steps, saves, and trains on until the checkpoint is complete. Collective.

    Returns:
        Seconds: `stall`; `complete`, from the call to the end of the writing; `quiet_steps` without a checkpoint being
        written, `writing_steps` with.
    """
    checkpointer.drain()
    safety = trainer.safety = _SavesOnce(checkpointer, steps)
    try:
        trainer.train()
    except _CompleteError:
        trainer.safety = Safety()
    assert safety.saved is not None
    return {
        "stall": safety.stall,
        "complete": safety.stall + safety.saved.write_seconds,
        "quiet_steps": safety.quiet[WARM_UP_STEPS:],
        "writing_steps": safety.writing,
    }


class _CompleteError(Exception):
    """The checkpoint is complete: enough training."""


class _SavesOnce(Safety):
    """Saves after some steps, and ends training when the checkpoint is complete on all ranks."""

    def __init__(self, checkpointer: Checkpointer, steps: int) -> None:
        self._checkpointer = checkpointer
        self._num_quiet = WARM_UP_STEPS + steps
        self.quiet: list[float] = []
        self.writing: list[float] = []
        self.stall = 0.0
        self.saved: Saved | None = None
        self._since = time.perf_counter()

    def after_step(self, trainer: Trainer, *, before_validation: bool) -> None:
        """See `Safety`."""
        del before_validation
        is_writing = len(self.quiet) == self._num_quiet
        (self.writing if is_writing else self.quiet).append(time.perf_counter() - self._since)
        if is_writing and self._is_complete(trainer.runtime):
            raise _CompleteError
        if not is_writing and len(self.quiet) == self._num_quiet:
            self.stall = save_now(trainer, self._checkpointer)
        self._since = time.perf_counter()

    def _is_complete(self, runtime: Runtime) -> bool:
        if self._checkpointer.has_failed:
            self._checkpointer.finish()
        self.saved = self.saved or next(iter(self._checkpointer.drain()), None)
        complete = torch.tensor(self.saved is not None, dtype=torch.int32)
        if runtime.world_size > 1:
            dist.all_reduce(complete, op=dist.ReduceOp.MIN, group=runtime.control_group)
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
