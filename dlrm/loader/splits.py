"""The three splits of a run, each an iterable of this rank's batches, built ahead of need."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from torch._C._profiler import _RecordFunctionFast

from dlrm.config.config import DEFAULT_RANDOM_BATCHES, Config, DataConfig
from dlrm.dataset.binary_days import DayRows, Stage, open_splits
from dlrm.dataset.multi_hot import check_hotness, check_multi_hot_folder
from dlrm.dataset.rows import Rows
from dlrm.errors import DatasetError
from dlrm.loader.batch import Batch, build_batch
from dlrm.loader.dense_statistics import DenseStatistics, sample_rows
from dlrm.loader.expansion import Companions, Expansion, share_companions
from dlrm.loader.frequencies import BYTES_PER_TABLE_ROW, IdFrequencies
from dlrm.loader.partition import Partition, Span
from dlrm.loader.prefetch import prefetch
from dlrm.loader.random_source import RandomSource
from dlrm.loader.sources import (
    ExpandedSplit,
    MappedSplit,
    RandomSplit,
    RowSet,
    ShuffledSplit,
    Source,
    bytes_per_row,
    check_split,
    load_split,
)
from dlrm.loader.undersampling import BITS_PER_ROW, undersample
from dlrm.ranks.runtime import Runtime, derive_seed, on_every_rank
from dlrm.schema.criteo import ONE_HOT
from dlrm.system.console import show_bytes
from dlrm.system.limits import is_address_space_limited
from dlrm.system.memory import MemoryBudget

STAGES: tuple[Stage, ...] = ("train", "val", "test")
_BATCHES_AHEAD = 4
_ROWS_AT_ONCE = 1 << 14
_RANDOM_SAMPLE_ROWS = 1 << 12


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
    frequencies: IdFrequencies | None = None
    """Counts the ids of batches that are trained on."""
    rows: DayRows | None = None
    """All rows on disk that it is of, before any are left out; None for random data."""
    mapped: Source | None = None
    """Gives any rows, where `source` has those of a pass from the start alone."""
    batches_ahead: int = _BATCHES_AHEAD
    """Batches that wait for the consumer, built on a thread; 0 builds each when it is asked for."""

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """This rank's batches of one pass."""
        built = self._build(epoch)
        return prefetch(built, self.batches_ahead) if self.batches_ahead else built

    def resumed(self, row: int, step: int) -> "Split":
        """The rest of a pass of which `row` rows were taken in `step` steps, by however many ranks."""
        if (partition := self.partition.resumed(row, step)) == self.partition:
            return self
        source = self.source if partition.is_regular or self.mapped is None else self.mapped
        return replace(self, partition=partition, source=source)

    def _build(self, epoch: int) -> Iterator[Batch]:
        if self.num_cached_batches is None:
            yield from self._build_batches(self.partition.spans(self.rank), epoch)
            return
        steps = self.partition.num_steps
        for step in range(epoch * steps + self.partition.first_step, (epoch + 1) * steps):
            yield self._cached_batches[step % len(self._cached_batches)]

    @cached_property
    def _cached_batches(self) -> list[Batch]:
        spans = self.partition.resumed(0, 0).spans(self.rank)
        return list(self._build_batches(islice(spans, self.num_cached_batches), epoch=0))

    def _build_batches(self, spans: Iterator[Span], epoch: int) -> Iterator[Batch]:
        spans_at_once = max(1, _ROWS_AT_ONCE // self.partition.batch_size)
        while group := tuple(islice(spans, spans_at_once)):
            read = self.source.read(group, epoch)
            for span in group:
                with _RecordFunctionFast("## build_batch ##"):  # next to nothing without a profiler
                    batch = self._build_batch(next(read), span, epoch)
                yield batch

    def _build_batch(self, rows: Rows, span: Span, epoch: int) -> Batch:
        if self.shuffle_seed is not None:
            seed = derive_seed(self.shuffle_seed, "shuffle_batches", self.rank, epoch, span.step)
            rows = rows.take(np.random.default_rng(seed).permutation(span.rows))
        return build_batch(rows, span, self.hotness, pinned=self.pin_memory)


def budget_of(runtime: Runtime) -> MemoryBudget:
    """All of the host memory that was free when the process joined the others."""
    return MemoryBudget(runtime.host_memory_bytes, runtime.local_world_size)


def expansion_of(data: DataConfig, table_rows: tuple[int, ...]) -> Expansion | None:
    """The companions that a run puts beside its ids as it reads them; None where it does not."""
    sizes = data.multi_hot_sizes
    if sizes is None or max(sizes) == 1 or data.synthetic_multi_hot_criteo_path is not None:
        return None
    if data.folder is None and data.multi_hot_distribution_type is None:
        return None
    return Expansion(table_rows, sizes, data.multi_hot_distribution_type or "uniform")


def draw_run_companions(
    config: Config, runtime: Runtime, stages: Sequence[Stage] = STAGES, budget: MemoryBudget | None = None
) -> Companions | None:
    """One copy a host of the companions that the run needs, once its data was found and its headers are right.

    Collective. None if no companions are needed.

    Args:
        budget: host memory; None for what was free when the process joined the others.

    Raises:
        DatasetError: if the data is missing or wrong, or the companions don't fit into memory.
    """
    expansion = expansion_of(config.data, config.model.table_rows)
    if expansion is None:
        return None
    if not config.is_random:
        on_every_rank(runtime, lambda: _open_days(config, stages))
    budget = budget or budget_of(runtime)
    return share_companions(expansion, runtime, budget, _label(config, runtime, "Drawing companions"))


def hotness_of(config: Config) -> tuple[int, ...]:
    """Ids per sample of each feature, as the flags or the headers of multi-hot days say.

    Raises:
        DatasetError: if the data is missing or wrong.
    """
    if config.data.synthetic_multi_hot_criteo_path is None:
        return config.data.multi_hot_sizes or ONE_HOT
    return _open_days(config, ("val",))["val"].widths


def measure_dense(config: Config) -> DenseStatistics:
    """Statistics of the training rows' integers, the same whatever the world size.

    Raises:
        DatasetError: if the data is missing or wrong.
    """
    if config.data.folder is None:
        sample_SI = _random_source(config, "train", ONE_HOT).read(0, _RANDOM_SAMPLE_ROWS).dense_BI
    else:
        days = _open_days(config, ("train",))["train"]
        sample_SI = sample_rows(days.num_rows, days.read_dense)
    return DenseStatistics.of(sample_SI, config.model.dense_buckets)


def open_run_splits(
    config: Config,
    runtime: Runtime,
    companions: Companions | None = None,
    stages: Sequence[Stage] = STAGES,
    budget: MemoryBudget | None = None,
) -> dict[Stage, Split]:
    """Opens, checks and (unless mapped) loads what the run reads. `config.training.seed` is set.

    Args:
        companions: what `draw_run_companions` gave.
        stages: the splits that are wanted.
        budget: host memory, of which the splits and the companions are spent; None for what was free when the process
            joined the others.

    Raises:
        DatasetError: if the data is missing or wrong, or does not fit into memory.
    """
    assert config.training.seed is not None
    data, table_rows = config.data, config.model.table_rows
    days = None if config.is_random else _open_days(config, stages)
    expansion = expansion_of(data, table_rows)
    assert (expansion is None) == (companions is None)
    budget = budget or budget_of(runtime)
    if days is not None and is_address_space_limited():
        budget.spend(sum(_mapped_bytes(rows) for rows in days.values()))
    if expansion is not None:
        budget.spend_on_host(expansion.num_bytes)
    if data.collect_multi_hot_freqs_stats:
        _spend_counts(table_rows, budget)
    if days is None:
        hotness = data.multi_hot_sizes or ONE_HOT
        splits = {stage: _random_split(config, stage, runtime, companions) for stage in stages}
    else:
        hotness = _hotness(next(iter(days.values())), companions)
        splits = _binary_splits(config, days, runtime, companions, budget)
    if data.collect_multi_hot_freqs_stats:
        splits["train"] = replace(splits["train"], frequencies=IdFrequencies(table_rows, hotness))
    return splits


def _open_days(config: Config, stages: Sequence[Stage]) -> dict[Stage, DayRows]:
    """The rows of some of the splits. Every header is checked."""
    data = config.data
    assert data.folder is not None
    multi_hot = None if (path := data.synthetic_multi_hot_criteo_path) is None else Path(path)
    if multi_hot is not None:
        check_multi_hot_folder(multi_hot, config.model.table_rows, Path(data.folder), "train" in stages)
    days = open_splits(Path(data.folder), data.dataset_name, multi_hot, needs_training="train" in stages)
    if multi_hot is not None:
        widths = data.multi_hot_sizes or days["val"].widths
        for piece in (piece for rows in days.values() for piece in rows.pieces):
            check_hotness(piece.day.paths["sparse"], piece.day.widths, widths, config.recipe)
    return {stage: days[stage] for stage in stages}


def _mapped_bytes(rows: DayRows) -> int:
    """Address space of the days that a split reads."""
    return sum(array.nbytes for piece in rows.pieces for array in (piece.day.dense, *piece.day.ids, piece.day.labels))


def _binary_splits(
    config: Config,
    days: Mapping[Stage, DayRows],
    runtime: Runtime,
    companions: Companions | None,
    budget: MemoryBudget,
) -> dict[Stage, Split]:
    data, seed = config.data, config.training.seed
    assert seed is not None
    sets: dict[Stage, RowSet] = {**days}
    if data.undersampling_rate is not None and "train" in days:
        label = _label(config, runtime, "Undersampling")
        sets["train"] = undersample(days["train"], data.undersampling_rate, derive_seed(seed, "undersampling"), label)
        budget.spend(int(days["train"].num_rows * BITS_PER_ROW / 8))
    partitions = {stage: _partition(data, stage, rows.num_rows, runtime.world_size) for stage, rows in sets.items()}
    _spend_rows(data, partitions, next(iter(sets.values())).widths, budget)
    table_rows = np.array(config.model.table_rows, dtype=np.int64)
    splits = {}
    for stage, rows in sets.items():
        is_training = stage == "train"
        source: Source
        mapped: Source = MappedSplit(rows, table_rows)
        is_loaded = not (data.mmap_mode or (is_training and data.shuffle_training_set))
        if is_loaded:
            label = _label(config, runtime, stage)
            source = load_split(rows, partitions[stage], runtime.rank, table_rows, label)
        elif is_training and data.shuffle_training_set:
            source = ShuffledSplit(rows, table_rows, seed)
        else:
            source = mapped
            if "train" in sets and config.evaluation.scores(stage):
                check_split(rows, partitions[stage], runtime.rank, _label(config, runtime, stage))
        if companions is not None:
            source, mapped = ExpandedSplit(source, companions), ExpandedSplit(mapped, companions)
        hotness = _hotness(rows, companions)
        splits[stage] = Split(
            source,
            partitions[stage],
            runtime.rank,
            hotness,
            shuffle_seed=seed if is_training and data.shuffle_batches else None,
            pin_memory=_pins(config, runtime),
            rows=days[stage],
            mapped=mapped if is_loaded else None,
        )
    return splits


def _hotness(rows: RowSet, companions: Companions | None) -> tuple[int, ...]:
    if companions is not None:
        return companions.hotness
    return rows.widths if len(rows.widths) > 1 else ONE_HOT


def _spend_rows(
    data: DataConfig, partitions: Mapping[Stage, Partition], widths: tuple[int, ...], budget: MemoryBudget
) -> None:
    """Refuses a training set that fills no batch, and rows that are to be loaded and don't fit into memory."""
    training = partitions.get("train")
    if training is not None and training.num_steps == 0:
        raise DatasetError(
            f"{data.folder}: {training.num_rows:,} training rows fill no batch of "
            f"{training.global_batch_size:,} over all ranks. Use a smaller --batch_size, or leave out "
            "--drop_last_training_batch."
        )
    if data.mmap_mode:
        return
    loaded = [part for stage, part in partitions.items() if stage != "train" or not data.shuffle_training_set]
    rows = sum(partition.num_used_rows for partition in loaded) // next(iter(partitions.values())).world_size
    needed = rows * bytes_per_row(widths)
    if needed > budget.left:
        raise DatasetError(
            f"{data.folder}: {show_bytes(needed)} of rows a rank, {show_bytes(max(0, budget.left))} free. "
            "Use --mmap_mode, or more hosts."
        )
    budget.spend(needed)


def _spend_counts(table_rows: tuple[int, ...], budget: MemoryBudget) -> None:
    """Refuses to count ids if the counts don't fit into memory."""
    needed = BYTES_PER_TABLE_ROW * sum(table_rows)
    if needed > budget.left:
        raise DatasetError(
            f"--collect_multi_hot_freqs_stats: {show_bytes(needed)} of counts a rank, "
            f"{show_bytes(max(0, budget.left))} free. Leave it out, or use smaller tables."
        )
    budget.spend(needed)


def _partition(data: DataConfig, stage: Stage, num_rows: int | None, world_size: int) -> Partition:
    batch_size = data.batch_size if stage == "train" else data.evaluation_batch_size
    limit = {"train": data.limit_train_batches, "val": data.limit_val_batches, "test": data.limit_test_batches}[stage]
    if num_rows is None:
        num_rows = (limit or DEFAULT_RANDOM_BATCHES) * batch_size * world_size
    drop_last = stage == "train" and data.drop_last_training_batch
    return Partition(num_rows, batch_size, world_size, drop_last, limit)


def _random_split(config: Config, stage: Stage, runtime: Runtime, companions: Companions | None) -> Split:
    partition = _partition(config.data, stage, None, runtime.world_size)
    hotness = config.data.multi_hot_sizes or ONE_HOT
    drawn = _random_source(config, stage, hotness if companions is None else ONE_HOT)
    source: Source = RandomSplit(drawn, partition.num_rows)
    if companions is not None:
        source = ExpandedSplit(source, companions)
    return Split(
        source,
        partition,
        runtime.rank,
        hotness,
        pin_memory=_pins(config, runtime),
        num_cached_batches=config.data.num_generated_batches,
    )


def _random_source(config: Config, stage: Stage, hotness: tuple[int, ...]) -> RandomSource:
    assert config.training.seed is not None
    seed = derive_seed(config.training.seed, "random", stage)
    return RandomSource(config.model.table_rows, hotness, config.data.zipf_exponent, seed)


def _label(config: Config, runtime: Runtime, text: str) -> str:
    """What rank 0 shows; empty where nothing is to be shown."""
    return text if runtime.is_main and config.output.print_progress else ""


def _pins(config: Config, runtime: Runtime) -> bool:
    return config.data.pin_memory and runtime.device.type == "cuda"
