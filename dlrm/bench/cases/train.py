"""`dlrm bench train`: batches to updated weights."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from dlrm.bench.harness.ceilings import ceilings_side
from dlrm.bench.harness.flags import WARM_UP_STEPS, Shape, TrainBench
from dlrm.bench.harness.floor import Floor
from dlrm.bench.harness.our_side import open_ours
from dlrm.bench.harness.plain_side import open_reference
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.report import (
    Speed,
    compare,
    describe_spread,
    print_floor,
    print_means,
    print_memory,
    print_speeds,
)
from dlrm.bench.harness.rounds import best_ceilings, fits_at_once, take_turns
from dlrm.bench.harness.shape import make_config, memory_gib
from dlrm.bench.harness.workers import Side
from dlrm.config.config import Config
from dlrm.cost.least_work import least_training_work
from dlrm.cost.work import Work
from dlrm.loader.random_rows import RandomRows
from dlrm.schema.criteo import ONE_HOT

BYTES = {"fp32": 4, "bf16": 2, "int16": 4, "int8": 2}
"""Of an activation."""

TRAINING_TURNS = ("train", "describe")


def run(bench: TrainBench) -> dict[str, Any]:
    """Measures, prints, writes; returns the result.

    Raises:
        DlrmError: what a side raised.
    """
    shape = bench.shape
    config = make_config(shape, WARM_UP_STEPS + (bench.steps or shape.steps_per_turn))
    print(describe_sides(shape), flush=True)
    sides = make_sides(config, shape, TRAINING_TURNS)
    at_once = fits_at_once(sides, memory_gib(config, shape.optimizer), shape.batch_size)
    results = take_turns(
        [*sides, ceilings_side(shape.arithmetic)], bench.repetition.rounds, show_rate(shape.batch_size), at_once=at_once
    )
    speeds = {side.name: Speed(shape.batch_size, results[side.name].turns["train"]) for side in sides}
    floor = Floor(count_training(config, shape), best_ceilings(results))
    facts = {side.name: results[side.name].to_json() for side in sides}
    result: dict[str, Any] = {
        "case": "train",
        **compare(speeds["ours"], speeds["reference"], floor),
        "sides": {name: {**facts[name], **speed.to_json()} for name, speed in speeds.items()},
        "bench": asdict(bench),
        "precision": shape.arithmetic,
        "at_once": at_once,
        "config": asdict(config),
    }
    print_speeds(speeds)
    print(f"ratio by round: {describe_spread(result['ratios'])}")
    print_floor(floor, speeds["ours"], "a step")
    for name, values in facts.items():
        print_memory(name, values)
    print_means("ours", result["sides"]["ours"])
    write_result(bench.repetition.json, result)
    return result


def make_sides(config: Config, shape: Shape, turns: tuple[str, ...]) -> list[Side]:
    """Ours and the reference, on the same flags."""
    return [
        Side("ours", open_ours, (config,), turns, shape.ranks),
        Side("reference", open_reference, (config,), turns, shape.ranks, is_plain=True),
    ]


def describe_sides(shape: Shape) -> str:
    """What runs against what."""
    units = {
        "bf16": "has AMX",
        "int8": "has AVX-512 VNNI and BF16, but no AMX",
        "int16": "has AVX-512 VNNI, but no bf16 units",
        "fp32": "lacks bf16 units and VNNI",
    }
    why = "as asked" if shape.precision else f"the CPU {units[shape.arithmetic]}"
    return (
        f"Ours in {shape.arithmetic} ({why}) against torchrec.models.dlrm in fp32: {shape.optimizer}, batch "
        f"{shape.batch_size:,} over {shape.ranks} rank{'s' * (shape.ranks > 1)} a side."
    )


def show_rate(samples: int) -> Callable[[str, str, Any], str | None]:
    """Lines of progress for turns that give seconds of steps."""

    def show(side: str, turn: str, value: Any) -> str | None:
        if not isinstance(value, list):
            return None
        return f"{side:<10} {turn:<9} {samples * len(value) / sum(value):>11,.0f} samples/s"

    return show


def count_training(config: Config, shape: Shape) -> Work:
    """The work of a step, all ranks together."""
    rows = count_distinct_rows(config, shape.batch_size)
    return least_training_work(config.model, shape.optimizer, shape.batch_size, rows, BYTES[shape.arithmetic])


def count_distinct_rows(config: Config, samples: int) -> int:
    """Table rows that a batch of so many samples names, each counted once."""
    source = RandomRows(config.model.table_rows, ONE_HOT, config.data.zipf_exponent, seed=0)
    ids_BF = source.read(0, samples).ids_BN
    return sum(len(np.unique(ids_B)) for ids_B in ids_BF.T)
