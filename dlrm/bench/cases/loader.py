"""`dlrm bench loader`: rows of memory-mapped days to batches."""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torchrec.datasets.criteo import InMemoryBinaryCriteoIterDataPipe

from dlrm.bench.harness.ceilings import ceilings_side
from dlrm.bench.harness.flags import WARM_UP_STEPS, LoaderBench, Shape
from dlrm.bench.harness.floor import Floor
from dlrm.bench.harness.our_side import lay_timed_foundation, read_pass, training_turns
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.report import Speed, compare, describe_spread, print_floor, print_speeds
from dlrm.bench.harness.rounds import best_ceilings, take_turns
from dlrm.bench.harness.shape import make_config, table_rows
from dlrm.bench.harness.workers import Side, Turns
from dlrm.config.config import Config
from dlrm.cost.least_work import RECORD
from dlrm.cost.work import Work
from dlrm.loader.random_rows import RandomRows
from dlrm.loader.run_data import RunData, build_splits
from dlrm.ranks.runtime import start_runtime
from dlrm.schema.criteo import ONE_HOT
from dlrm.system.console import show_bytes

_CHUNK_ROWS = 1 << 18
_PARTS = ("dense", "sparse", "labels")


def run(bench: LoaderBench) -> dict[str, Any]:
    """Measures, prints, writes; returns the result.

    Raises:
        DlrmError: what a side raised.
    """
    shape = bench.shape
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        print(f"Writing {bench.num_rows:,} rows, {show_bytes(bench.num_rows * RECORD)}.", flush=True)
        write_days(Path(folder), bench.num_rows, shape)
        config = make_loader_config(bench, Path(folder))
        sides = [
            Side("ours", open_reader, (config,), ("load", "train"), shape.ranks),
            Side("reference", open_reference_reader, (config,), ("load",), shape.ranks, is_plain=True),
        ]
        results = take_turns([*sides, ceilings_side("fp32")], bench.repetition.rounds, partial(show_rate, bench))
    training = Speed(shape.batch_size, results["ours"].turns["train"])
    speeds = {side.name: pass_speed(bench.num_rows, results[side.name].turns["load"]) for side in sides}
    # Each row is read once from the page cache, and written once into a batch.
    floor = Floor(Work(0, 2 * RECORD * speeds["ours"].samples), best_ceilings(results))
    over_training = [a / b for a, b in zip(speeds["ours"].rates, training.rates, strict=True)]
    result: dict[str, Any] = {
        "case": "loader",
        **compare(speeds["ours"], speeds["reference"], floor),
        "over_training": statistics.median(over_training),
        "over_training_rounds": over_training,
        "sides": {name: {**results[name].to_json(), **speed.to_json()} for name, speed in speeds.items()},
        "training": training.to_json(),
        "bench": asdict(bench),
        "config": asdict(config),
    }
    print_speeds({"our training": training, "our reader": speeds["ours"], "reference": speeds["reference"]}, "rows")
    print(f"ratio by round: {describe_spread(result['ratios'])}; over our training: {describe_spread(over_training)}")
    print_floor(floor, speeds["ours"], "a batch")
    write_result(bench.repetition.json, result)
    return result


def make_loader_config(bench: LoaderBench, folder: Path) -> Config:
    """Our run on those days. It trains for one turn's steps; the reader takes all rows."""
    shape = bench.shape
    steps = min(WARM_UP_STEPS + shape.steps_per_turn, bench.num_rows // shape.batch_size)
    config = make_config(shape, steps)
    data = replace(
        config.data,
        in_memory_binary_criteo_path=str(folder),
        mmap_mode=True,
        shuffle_training_set=bench.shuffle_training_set,
        num_generated_batches=None,
        zipf_exponent=0.0,
    )
    return replace(config, data=data)


def write_days(folder: Path, num_rows: int, shape: Shape) -> None:
    """A day of so many rows to train on, and a short one that is held out. Ids follow the shape's power law."""
    for day, rows in enumerate((num_rows, 2 * shape.batch_size)):
        source = RandomRows(table_rows(shape), ONE_HOT, shape.exponent, seed=day)
        arrays = [
            np.lib.format.open_memmap(folder / f"day_{day}_{part}.npy", "w+", dtype, (rows, columns))
            for part, dtype, columns in (("dense", np.float32, 13), ("sparse", np.int32, 26), ("labels", np.int32, 1))
        ]
        for start in range(0, rows, _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, rows)
            drawn = source.read(start, stop)
            for array, part in zip(arrays, (drawn.dense_BI, drawn.ids_BN, drawn.labels_B[:, None]), strict=True):
                array[start:stop] = part


@contextmanager
def open_reader(config: Config) -> Iterator[Turns]:
    """Our side's turns: `load`, all rows, and `train`."""
    with start_runtime() as runtime:
        everything = replace(config, data=replace(config.data, limit_train_batches=None))
        split = build_splits(RunData.open(everything), runtime)["train"]
        turns = training_turns(*lay_timed_foundation(config, runtime))
        yield {**turns, "load": partial(read_pass, split.batches)}


@contextmanager
def open_reference_reader(config: Config) -> Iterator[Turns]:
    """TorchRec's turn `load`. Its batches leave integers and labels on the mapping, unread, where ours copies them."""
    folder = str(config.data.in_memory_binary_criteo_path)

    def open_pipe() -> Iterator[Any]:
        return iter(
            InMemoryBinaryCriteoIterDataPipe(
                "train",
                *([str(Path(folder, f"day_0_{part}.npy"))] for part in _PARTS),
                batch_size=config.data.batch_size,
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
                shuffle_training_set=config.data.shuffle_training_set,
                mmap_mode=True,
                hashes=list(config.model.table_rows),
            )
        )

    yield {"load": partial(read_pass, open_pipe)}


def pass_speed(num_rows: int, turns: Sequence[Sequence[float]]) -> Speed:
    """Of passes over so many rows, given the seconds of each batch."""
    return Speed(num_rows / len(turns[0]), turns)


def show_rate(bench: LoaderBench, side: str, turn: str, value: Any) -> str | None:
    """A line of progress."""
    if turn not in ("load", "train"):
        return None
    rows = bench.num_rows if turn == "load" else bench.shape.batch_size * len(value)
    return f"{side:<10} {turn:<9} {rows / sum(value):>11,.0f} rows/s"
