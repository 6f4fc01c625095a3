"""The count and encode stages: which ids get an index of their own, and the index of every row. Column by column."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dlrm.errors import DatasetError
from dlrm.preprocess.columns import read_ids
from dlrm.preprocess.layout import Layout
from dlrm.preprocess.run import Finished, Run
from dlrm.preprocess.vocabulary import (
    RARE_INDEX,
    IdBlocks,
    Ids,
    Order,
    choose_by_first_row,
    choose_by_frequency,
    count_column,
    count_rows,
    lookup_tables,
    vocabulary_files,
)
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_CATEGORICAL_FEATURES
from dlrm.system.console import Progress
from dlrm.system.files import naming, write_array


def count(run: Run, layout: Layout) -> None:
    """Counts the ids of each column, and writes the vocabulary. Collective."""
    if run.config.vocabulary is not None:
        if run.ranks.is_main:
            source, target = Path(run.config.vocabulary, "vocabulary"), run.workspace.days / "vocabulary"
            shutil.copytree(source, target, dirs_exist_ok=True)
            run.workspace.finish("count", "vocabulary", {}, [*target.iterdir(), target])
        run.meet()
        return
    ids = (layout.num_rows if _counts_all(run) else layout.num_train_rows) * NUM_CATEGORICAL_FEATURES
    with run.stage("Counting ids", "ids", ids) as progress:
        run.each_column("count", partial(_count_column, run, layout, progress))


def _counts_all(run: Run) -> bool:
    return run.config.is_compat or run.config.vocabulary_days == "all"


def _count_column(run: Run, layout: Layout, progress: Progress, column: int, memory: int, may_split: bool) -> Finished:
    name = CATEGORICAL_NAMES[column]
    folder, finished = run.workspace.folder("counts"), run.workspace.folder("days", "vocabulary")
    counts, first_rows = folder / name, folder / f"{name}.first_rows"
    for stale in (*finished.glob(f"{name}.*"), counts, first_rows):
        stale.unlink(missing_ok=True)
    counts_all = _counts_all(run)

    def blocks() -> Iterator[tuple[int, Ids]]:
        progress.begin_pass(name, layout.num_rows if counts_all else layout.num_train_rows)
        for block in layout.blocks:
            if rows := block.rows if counts_all else layout.train_rows_of(block):
                yield block.first_row, read_ids(run.parsed_path(block), column, block.rows)[:rows]
                progress.advance(rows)

    order: Order = "first_seen" if run.config.is_compat else "frequency"
    with naming(counts), counts.open("wb") as counts_file, first_rows.open("wb") as first_rows_file:
        if run.config.is_compat and (zeros := _count_zeros(blocks)) is not None:
            write_array(counts_file, np.array([zeros[0]], np.uint64))
            write_array(first_rows_file, np.array([zeros[1]], np.int64))
        for counted in count_column(blocks, order, memory, may_split):
            write_array(counts_file, counted.entries)
            write_array(first_rows_file, counted.first_rows)
    threshold = run.config.frequency_threshold
    if run.config.is_compat:
        choice = choose_by_first_row(counts, first_rows, threshold, finished, name, layout.num_rows, memory)
    else:
        choice = choose_by_frequency(counts, threshold, finished, name)
    counts.unlink()
    first_rows.unlink()
    return {"distinct": choice.distinct, "kept": choice.kept}, [finished]


def _count_zeros(blocks: IdBlocks) -> tuple[int, int] | None:
    """How often id 0 occurs, and the first row that has it; None if no row has it."""
    count, first = 0, None
    for first_row, ids_R in blocks():
        zeros = np.flatnonzero(ids_R == 0)
        count += len(zeros)
        if first is None and len(zeros):
            first = first_row + int(zeros[0])
    return None if first is None else (min(count, 2**32 - 1), first)


def describe_column(run: Run, name: str) -> dict[str, int]:
    """`distinct`: the number of distinct ids of a column. `kept`: how many of them have an index."""
    return run.config.applied["columns"][name] if run.config.applied else run.recorded("count", name)


def encode(run: Run, layout: Layout) -> None:
    """Writes the indices of each column. Collective."""
    with run.stage("Encoding", "ids", layout.num_rows * NUM_CATEGORICAL_FEATURES) as progress:
        for name in run.names:
            run.workspace.folder("encoded", name)
        run.each_column("encode", partial(_encode_column, run, layout, progress))


def _encode_column(run: Run, layout: Layout, progress: Progress, column: int, memory: int, may_split: bool) -> Finished:
    name = CATEGORICAL_NAMES[column]
    files = vocabulary_files(run.workspace.days / "vocabulary", name)
    kept = describe_column(run, name)["kept"]
    if sum(count_rows(path) for path in files) != kept:
        raise DatasetError(
            f"{run.workspace.days / 'vocabulary'}: {name} does not have {kept:,} ids. Remove {run.workspace.root} to "
            "start again."
        )
    paths = [run.encoded_path(day, name) for day in range(len(run.names))]
    for path in paths:
        path.touch()
    max_embeddings = run.config.most_embeddings
    # One table has all ids if they fit into memory. Otherwise each pass over the column fills in the ids of one table.
    for turn, table in enumerate(lookup_tables(files, max_embeddings, memory, may_split)):
        progress.begin_pass(name, layout.num_rows)
        for path, blocks in zip(paths, layout.days, strict=True):
            with naming(path), path.open("r+b") as file:
                for block in blocks:
                    ids_R = read_ids(run.parsed_path(block), column, block.rows)
                    if turn == 0:
                        indices_R = np.where(ids_R == 0, np.int32(table.missing_index), np.int32(RARE_INDEX))
                    else:
                        indices_R = np.fromfile(path, np.int32, block.rows, offset=4 * block.day_row)
                    table.look_up(ids_R, indices_R)
                    file.seek(4 * block.day_row)
                    write_array(file, indices_R)
                    progress.advance(block.rows)
                file.flush()
    return {}, paths
