"""The three splits of a run, each an iterable of this rank's batches, built ahead of need."""

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch._C._profiler import _RecordFunctionFast
from torch.multiprocessing import _set_thread_name

from dlrm.config import DEFAULT_RANDOM_BATCHES, Config
from dlrm.data.batch import Batch, build_batch
from dlrm.data.binary_days import DayRows, Stage, open_splits
from dlrm.data.partition import Partition, Span
from dlrm.data.random_source import RandomSource
from dlrm.data.source import BYTES_PER_ROW, MappedSplit, RandomSplit, Source, load_split
from dlrm.errors import DatasetError
from dlrm.runtime import Runtime, derive_seed
from dlrm.schema import NUM_CATEGORICAL_FEATURES

T = TypeVar("T")

STAGES: tuple[Stage, ...] = ("train", "val", "test")
_BATCHES_AHEAD = 4
_SECONDS_OF_GRACE = 0.005
_ONE_HOT = (1,) * NUM_CATEGORICAL_FEATURES


@dataclass(frozen=True)
class Split:
    """One split as this rank sees it."""

    source: Source
    partition: Partition
    rank: int
    hotness: tuple[int, ...]
    shuffle_seed: int | None = None
    pin_memory: bool = False
    num_cached_batches: int | None = None
    """Build this many batches once and cycle through them."""
    batches_ahead: int = _BATCHES_AHEAD
    """Batches that wait for the consumer, built on a thread; 0 builds each when it is asked for."""

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """This rank's batches of one pass."""
        built = self._build(epoch)
        return prefetch(built, self.batches_ahead) if self.batches_ahead else built

    def _build(self, epoch: int) -> Iterator[Batch]:
        for span in self.partition.spans(self.rank):
            if self.num_cached_batches is None:
                yield self._build_batch(span, epoch)
            else:
                step = epoch * self.partition.num_steps + span.step
                yield self._cached_batches[step % len(self._cached_batches)]

    @cached_property
    def _cached_batches(self) -> list[Batch]:
        spans = islice(self.partition.spans(self.rank), self.num_cached_batches)
        return [self._build_batch(span, epoch=0) for span in spans]

    def _build_batch(self, span: Span, epoch: int) -> Batch:
        with _RecordFunctionFast("## build_batch ##"):  # 2 us without a profiler, a thirtieth of record_function's
            return self._read_batch(span, epoch)

    def _read_batch(self, span: Span, epoch: int) -> Batch:
        rows = self.source.read(span, epoch)
        if self.shuffle_seed is not None:
            seed = derive_seed(self.shuffle_seed, "shuffle_batches", self.rank, epoch, span.step)
            rows = rows.take(np.random.default_rng(seed).permutation(span.rows))
        batch = build_batch(rows, span, self.hotness)
        return batch.pin_memory() if self.pin_memory else batch


def open_run_splits(config: Config, runtime: Runtime) -> dict[Stage, Split]:
    """Opens, checks and (unless mapped) loads what the run reads. `config.training.seed` is set.

    Raises:
        DatasetError: if the data is missing or wrong.
    """
    if config.is_random:
        return {stage: _random_split(config, stage, runtime) for stage in STAGES}
    assert config.data.in_memory_binary_criteo_path is not None
    days = open_splits(Path(config.data.in_memory_binary_criteo_path), config.data.dataset_name)
    partitions = {stage: _partition(config, stage, rows.num_rows, runtime.world_size) for stage, rows in days.items()}
    _check_sizes(config, partitions, runtime)
    return {stage: _binary_split(config, stage, rows, partitions[stage], runtime) for stage, rows in days.items()}


def _check_sizes(config: Config, partitions: Mapping[Stage, Partition], runtime: Runtime) -> None:
    training = partitions["train"]
    if training.num_steps == 0:
        raise DatasetError(
            f"{config.data.in_memory_binary_criteo_path}: {training.num_rows:,} training rows fill no batch of "
            f"{training.global_batch_size:,} over all ranks. Use a smaller --batch_size, or leave out "
            "--drop_last_training_batch."
        )
    if config.data.mmap_mode:
        return
    rows = sum(partition.num_used_rows for partition in partitions.values()) // runtime.world_size
    needed, available = rows * BYTES_PER_ROW, runtime.host_memory_bytes // runtime.local_world_size
    if needed > available:
        raise DatasetError(
            f"{config.data.in_memory_binary_criteo_path}: {needed / 2**30:.1f} GiB of rows a rank, "
            f"{available / 2**30:.1f} GiB free. Use --mmap_mode, or more hosts."
        )


def _partition(config: Config, stage: Stage, num_rows: int | None, world_size: int) -> Partition:
    data = config.data
    batch_size = data.batch_size if stage == "train" else data.test_batch_size or data.batch_size
    limit = {"train": data.limit_train_batches, "val": data.limit_val_batches, "test": data.limit_test_batches}[stage]
    if num_rows is None:
        num_rows = (limit or DEFAULT_RANDOM_BATCHES) * batch_size * world_size
    drop_last = stage == "train" and data.drop_last_training_batch
    return Partition(num_rows, batch_size, world_size, drop_last, limit)


def _random_split(config: Config, stage: Stage, runtime: Runtime) -> Split:
    assert config.training.seed is not None
    partition = _partition(config, stage, None, runtime.world_size)
    hotness = config.data.multi_hot_sizes or _ONE_HOT
    source = RandomSource(
        config.model.table_rows, hotness, config.data.zipf_exponent, derive_seed(config.training.seed, "random", stage)
    )
    return Split(
        RandomSplit(source, partition.num_rows),
        partition,
        runtime.rank,
        hotness,
        pin_memory=_pins(config, runtime),
        num_cached_batches=config.data.num_generated_batches,
    )


def _binary_split(config: Config, stage: Stage, rows: DayRows, partition: Partition, runtime: Runtime) -> Split:
    table_rows = np.array(config.model.table_rows, dtype=np.int64)
    source: Source
    if config.data.mmap_mode:
        source = MappedSplit(rows, table_rows)
    else:
        label = stage if runtime.is_main and config.output.print_progress else ""
        source = load_split(rows, partition, runtime.rank, table_rows, label)
    shuffle_seed = config.training.seed if stage == "train" and config.data.shuffle_batches else None
    return Split(source, partition, runtime.rank, _ONE_HOT, shuffle_seed, _pins(config, runtime))


def _pins(config: Config, runtime: Runtime) -> bool:
    return config.data.pin_memory and runtime.device.type == "cuda"


def prefetch(items: Iterator[T], depth: int) -> Iterator[T]:
    """Runs `items` on a thread, `depth` ready and one in the making at most; its exceptions come out here.

    The thread ends when the consumer stops early.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def produce() -> None:
        _set_thread_name("batch-builder")  # in traces and in top; threading's own name stays inside Python
        try:
            for item in items:
                if not _put(ready, (item, None), stopped):
                    return
            _put(ready, (None, None), stopped)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
            _put(ready, (None, error), stopped)

    thread = threading.Thread(target=produce, name="batch-builder", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def _put(ready: "queue.Queue[T]", item: T, stopped: threading.Event) -> bool:
    was_full = ready.full()
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            # The consumer has just taken a batch: wait until it computes, when it does not need Python's lock.
            return not (was_full and stopped.wait(_SECONDS_OF_GRACE))
        except queue.Full:
            continue
    return False
