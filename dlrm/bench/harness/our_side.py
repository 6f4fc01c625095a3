"""Our side: the trainer as a user starts it, with its steps timed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipeline
from torchrec.streamable import Pipelineable

from dlrm.assembly.foundation import Foundation, lay_foundation
from dlrm.bench.harness.flags import WARM_UP_STEPS
from dlrm.bench.harness.workers import Turns
from dlrm.config.config import Config, OptimizerConfig
from dlrm.cost.optimizer_state import state_floats
from dlrm.kernels.native import describe_kernels
from dlrm.loader.batch import Batch
from dlrm.metrics.journal import Journal
from dlrm.metrics.sinks import Sinks
from dlrm.model.dlrm import Output
from dlrm.ranks.runtime import Runtime, start_runtime
from dlrm.system.allocator import describe_allocator
from dlrm.train.trainer import Trainer

In = TypeVar("In", bound=Pipelineable)
Out = TypeVar("Out")


class StepClock(TrainPipeline[In, Out]):
    """A pipeline that notes when each of its steps ends, so that what a loop does between steps counts too."""

    def __init__(self, pipeline: TrainPipeline[In, Out]) -> None:
        self._pipeline = pipeline
        self.ends: list[float] = []

    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        """A step."""
        output = self._pipeline.progress(dataloader_iter)
        self.ends.append(time.perf_counter())
        return output

    def reset(self) -> None:
        """See `TrainPipeline`."""
        self._pipeline.reset()

    def seconds(self) -> list[float]:
        """Of each step after those that warm up; starts over."""
        timed = self.ends[WARM_UP_STEPS - 1 :]
        self.ends = []
        return [stop - start for start, stop in pairwise(timed)]


@contextmanager
def open_ours(config: Config) -> Iterator[Turns]:
    """A side of `train` (seconds of each step), `evaluate` (of a pass over the validation set), and `describe`."""
    with start_runtime() as runtime:
        yield training_turns(*lay_timed_foundation(config, runtime))


def lay_timed_foundation(config: Config, runtime: Runtime) -> tuple[Foundation, StepClock[Batch, Output]]:
    """A run's foundation, whose pipeline is timed."""
    foundation = lay_foundation(config, runtime, is_quiet=True)
    clock = StepClock(foundation.pipeline)
    return replace(foundation, pipeline=clock), clock


def training_turns(foundation: Foundation, clock: StepClock[Batch, Output]) -> dict[str, Any]:
    """See `open_ours`. A turn of training is an epoch."""
    trainer = Trainer(foundation, Journal(Sinks([])))

    def train() -> list[float]:
        trainer.train(trainer.position.epoch + 1)
        return clock.seconds()

    def evaluate() -> list[float]:
        started = time.perf_counter()
        trainer.evaluate("val")
        elapsed = time.perf_counter() - started
        clock.seconds()
        return [elapsed]

    def describe_ours() -> dict[str, Any]:
        means = {"kernels": describe_kernels(), "allocator": describe_allocator()}
        return {**describe(foundation.model, foundation.config.optimizer), **means}

    return {"train": train, "evaluate": evaluate, "describe": describe_ours}


def read_pass(open_batches: Callable[[], Iterator[object]]) -> list[float]:
    """Takes all batches and does nothing with them; seconds until each was there, opening included."""
    ends = [time.perf_counter()]
    for _ in open_batches():
        ends.append(time.perf_counter())
    return [stop - start for start, stop in pairwise(ends)]


def describe(model: DistributedModelParallel, optimizer: OptimizerConfig) -> dict[str, float]:
    """This rank's threads and its part of the tables: GiB of weights, and of optimizer state."""
    weights = state = 0.0
    for name, weight in model.state_dict().items():
        if ".embedding_bags." in name:
            shards = [s.tensor for s in weight.local_shards()] if isinstance(weight, ShardedTensor) else [weight]
            for shard in shards:
                weights += shard.numel() * shard.element_size()
                state += shard.size(0) * state_floats(optimizer.algorithm, shard.size(1)) * 4
    return {"threads": torch.get_num_threads(), "tables_gib": weights / 2**30, "state_gib": state / 2**30}
