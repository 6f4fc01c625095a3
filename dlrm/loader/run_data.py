"""What a run reads: its data is opened once, and becomes the splits that the run trains on and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dlrm.config.config import DEFAULT_RANDOM_BATCHES, Config, DataConfig
from dlrm.dataset.binary_days import STAGES, DayRows, Stage, open_splits
from dlrm.dataset.multi_hot import check_hotness, check_multi_hot_folder
from dlrm.errors import DatasetError
from dlrm.loader.dense_statistics import DenseStatistics, sample_rows
from dlrm.loader.expansion import Companions, Expansion, share_companions
from dlrm.loader.frequencies import BYTES_PER_TABLE_ROW, IdFrequencies
from dlrm.loader.partition import Partition
from dlrm.loader.random_rows import RandomRows
from dlrm.loader.sources import (
    ExpandedSource,
    MappedSource,
    RandomSource,
    RowSet,
    ShuffledSource,
    Source,
    bytes_per_row,
    check_rows,
    load_rows,
)
from dlrm.loader.split import Split
from dlrm.loader.undersampling import BITS_PER_ROW, undersample
from dlrm.ranks.runtime import Runtime, derive_seed
from dlrm.schema.criteo import ONE_HOT
from dlrm.system.console import show_bytes
from dlrm.system.limits import is_address_space_limited
from dlrm.system.memory import MemoryBudget

_RANDOM_SAMPLE_ROWS = 1 << 12


@dataclass(frozen=True)
class RunData:
    """The data of a run: found, with every header checked. No row was read yet.

    Attributes:
        config: with a seed, unless only headers are of interest.
        stages: splits that the run wants.
        days: rows on disk of each of those splits; empty for random data.
    """

    config: Config
    stages: tuple[Stage, ...]
    days: Mapping[Stage, DayRows]

    @staticmethod
    def open(config: Config, stages: Sequence[Stage] = STAGES) -> "RunData":
        """Finds the data and checks its headers.

        Raises:
            DatasetError: if the data is missing or wrong.
        """
        return RunData(config, tuple(stages), {} if config.is_random else _open_days(config, stages))

    @property
    def hotness(self) -> tuple[int, ...]:
        """Ids per sample of each feature, as the headers of multi-hot days or the flags say."""
        data = self.config.data
        if data.synthetic_multi_hot_criteo_path is not None:
            return next(iter(self.days.values())).widths
        return data.multi_hot_sizes or ONE_HOT

    @property
    def expansion(self) -> Expansion | None:
        """The companions that the run adds to its ids as it reads them; None if it adds none."""
        data = self.config.data
        if data.multi_hot_sizes is None or max(data.multi_hot_sizes) == 1:
            return None
        if data.synthetic_multi_hot_criteo_path is not None:
            return None
        if data.folder is None and data.multi_hot_distribution_type is None:
            return None
        distribution = data.multi_hot_distribution_type or "uniform"
        return Expansion(self.config.model.table_rows, data.multi_hot_sizes, distribution)

    def measure_dense(self) -> DenseStatistics:
        """Statistics of the training rows' integers. They do not depend on the number of ranks.

        Raises:
            DatasetError: at a value that is not finite.
        """
        if self.days:
            days = self.days["train"]
            sample_SI = sample_rows(days.num_rows, days.read_dense)
        else:
            sample_SI = _random_rows(self.config, "train", ONE_HOT).read(0, _RANDOM_SAMPLE_ROWS).dense_BI
        return DenseStatistics.of(sample_SI, self.config.model.dense_buckets)


def hotness_of(config: Config) -> tuple[int, ...]:
    """`RunData.hotness` of a run that opens no data. Of multi-hot days only the held-out day's headers are read.

    Raises:
        DatasetError: if the data is missing or wrong.
    """
    if config.data.synthetic_multi_hot_criteo_path is None:
        return config.data.multi_hot_sizes or ONE_HOT
    return RunData.open(config, ("val",)).hotness


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


def budget_of(runtime: Runtime) -> MemoryBudget:
    """All of the host memory that was free when the process joined the others."""
    return MemoryBudget(runtime.host_memory_bytes, runtime.local_world_size)


def draw_run_companions(data: RunData, runtime: Runtime, budget: MemoryBudget) -> Companions | None:
    """Draws the companions that the run needs, once on each host. None if it needs none. Collective.

    Raises:
        DatasetError: if they do not fit into memory.
    """
    if (expansion := data.expansion) is None:
        return None
    return share_companions(expansion, runtime, budget, _label(data.config, runtime, "Drawing companions"))


def build_splits(
    data: RunData, runtime: Runtime, companions: Companions | None = None, budget: MemoryBudget | None = None
) -> dict[Stage, Split]:
    """The splits of a run. Rows are loaded into memory, or stay on disk and are checked, as the flags say.

    Args:
        companions: what `draw_run_companions` returned.
        budget: host memory, on which rows and companions are spent; None for all that was free when the process joined
            the others.

    Raises:
        DatasetError: if a value is wrong, or the rows do not fit into memory.
    """
    config, expansion = data.config, data.expansion
    assert config.training.seed is not None
    assert (expansion is None) == (companions is None)
    table_rows, counts_ids = config.model.table_rows, config.data.collect_multi_hot_freqs_stats
    budget = budget or budget_of(runtime)
    if is_address_space_limited():
        budget.spend(sum(_mapped_bytes(rows) for rows in data.days.values()))
    if expansion is not None:
        budget.spend_on_host(expansion.num_bytes)
    if counts_ids:
        _spend_on_counts(table_rows, budget)
    if data.days:
        splits = _splits_on_disk(data, runtime, companions, budget)
    else:
        splits = {stage: _random_split(data, stage, runtime, companions) for stage in data.stages}
    if counts_ids:
        splits["train"] = replace(splits["train"], frequencies=IdFrequencies(table_rows, data.hotness))
    return splits


def _mapped_bytes(rows: DayRows) -> int:
    """Address space of the days that a split reads."""
    return sum(array.nbytes for piece in rows.pieces for array in (piece.day.dense, *piece.day.ids, piece.day.labels))


def _splits_on_disk(
    data: RunData, runtime: Runtime, companions: Companions | None, budget: MemoryBudget
) -> dict[Stage, Split]:
    config, seed = data.config, data.config.training.seed
    assert seed is not None
    kept = _undersample(data, runtime, budget)
    partitions = {stage: _partition(config.data, stage, rows.num_rows, runtime) for stage, rows in kept.items()}
    _spend_on_rows(config.data, partitions, next(iter(kept.values())).widths, budget)
    splits = {}
    for stage, rows in kept.items():
        source, mapped = _source_on_disk(config, stage, rows, partitions[stage], runtime, "train" in kept)
        if companions is not None:
            source, mapped = ExpandedSource(source, companions), mapped and ExpandedSource(mapped, companions)
        splits[stage] = Split(
            source,
            partitions[stage],
            runtime.rank,
            data.hotness,
            shuffle_seed=seed if stage == "train" and config.data.shuffle_batches else None,
            pin_memory=_pins(config, runtime),
            rows=data.days[stage],
            mapped=mapped,
        )
    return splits


def _undersample(data: RunData, runtime: Runtime, budget: MemoryBudget) -> dict[Stage, RowSet]:
    """The rows of each split; of the training rows those that are kept."""
    config, rate = data.config, data.config.data.undersampling_rate
    kept: dict[Stage, RowSet] = {**data.days}
    if rate is not None and "train" in data.days:
        assert config.training.seed is not None
        rows, seed = data.days["train"], derive_seed(config.training.seed, "undersampling")
        kept["train"] = undersample(rows, rate, seed, _label(config, runtime, "Undersampling"))
        budget.spend(int(rows.num_rows * BITS_PER_ROW / 8))
    return kept


def _source_on_disk(
    config: Config, stage: Stage, rows: RowSet, partition: Partition, runtime: Runtime, is_training_run: bool
) -> tuple[Source, Source | None]:
    """The source of a split, and one that gives any rows if the first one has only this rank's own in memory."""
    data, seed, label = config.data, config.training.seed, _label(config, runtime, stage)
    assert seed is not None
    table_rows: npt.NDArray[np.int64] = np.array(config.model.table_rows, dtype=np.int64)
    mapped = MappedSource(rows, table_rows)
    if stage == "train" and data.shuffle_training_set:
        return ShuffledSource(rows, table_rows, seed), None
    if not data.mmap_mode:
        return load_rows(rows, partition, runtime.rank, table_rows, label), mapped
    if is_training_run and config.evaluation.scores(stage):
        check_rows(rows, partition, runtime.rank, label)
    return mapped, None


def _spend_on_rows(
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


def _spend_on_counts(table_rows: tuple[int, ...], budget: MemoryBudget) -> None:
    """Refuses to count ids if the counts don't fit into memory."""
    needed = BYTES_PER_TABLE_ROW * sum(table_rows)
    if needed > budget.left:
        raise DatasetError(
            f"--collect_multi_hot_freqs_stats: {show_bytes(needed)} of counts a rank, "
            f"{show_bytes(max(0, budget.left))} free. Leave it out, or use smaller tables."
        )
    budget.spend(needed)


def _partition(data: DataConfig, stage: Stage, num_rows: int | None, runtime: Runtime) -> Partition:
    batch_size = data.batch_size if stage == "train" else data.evaluation_batch_size
    limit = {"train": data.limit_train_batches, "val": data.limit_val_batches, "test": data.limit_test_batches}[stage]
    if num_rows is None:
        num_rows = (limit or DEFAULT_RANDOM_BATCHES) * batch_size * runtime.world_size
    drop_last = stage == "train" and data.drop_last_training_batch
    return Partition(num_rows, batch_size, runtime.world_size, drop_last, limit)


def _random_split(data: RunData, stage: Stage, runtime: Runtime, companions: Companions | None) -> Split:
    config = data.config
    partition = _partition(config.data, stage, None, runtime)
    rows = _random_rows(config, stage, data.hotness if companions is None else ONE_HOT)
    source: Source = RandomSource(rows, partition.num_rows)
    if companions is not None:
        source = ExpandedSource(source, companions)
    return Split(
        source,
        partition,
        runtime.rank,
        data.hotness,
        pin_memory=_pins(config, runtime),
        num_cached_batches=config.data.num_generated_batches,
    )


def _random_rows(config: Config, stage: Stage, hotness: tuple[int, ...]) -> RandomRows:
    assert config.training.seed is not None
    seed = derive_seed(config.training.seed, "random", stage)
    return RandomRows(config.model.table_rows, hotness, config.data.zipf_exponent, seed)


def _label(config: Config, runtime: Runtime, text: str) -> str:
    """The label of a progress bar on rank 0; empty if no bar is shown."""
    return text if runtime.is_main and config.output.print_progress else ""


def _pins(config: Config, runtime: Runtime) -> bool:
    return config.data.pin_memory and runtime.device.type == "cuda"
