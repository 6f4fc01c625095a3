"""`dlrm bench checkpoint`: a training saved and loaded."""

import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from dlrm.bench.cases.checkpoint_sides import ENDLESS, open_ours, open_torch_save
from dlrm.bench.harness.ceilings import ceilings_side
from dlrm.bench.harness.flags import CheckpointBench
from dlrm.bench.harness.floor import Floor
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.report import Speed, compare, describe_spread, print_durations, print_floor
from dlrm.bench.harness.rounds import best_ceilings, fits_at_once, take_turns
from dlrm.bench.harness.shape import make_config, memory_gib
from dlrm.bench.harness.workers import Side
from dlrm.cost.work import Work
from dlrm.errors import ConfigError
from dlrm.system.console import plural, show_bytes

_COPIES_ON_DISK = 3
"""What torch.save wrote, our newest checkpoint, and the one that takes its place."""


def run(bench: CheckpointBench) -> dict[str, Any]:
    """Measures, prints, writes; returns the result.

    Raises:
        DlrmError: what a side raised, or if the disk is too small.
    """
    shape = bench.shape
    config = make_config(shape, ENDLESS, bench.embedding_dim)
    tables_gib = memory_gib(config, shape.optimizer)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        disk = describe_disk(Path(folder), _COPIES_ON_DISK * tables_gib)
        print(
            f"{tables_gib:.2f} GiB of tables and optimizer state over {plural(shape.ranks, 'rank')}, saved to {disk}. "
            "Loading is warm.",
            flush=True,
        )
        turns = ("save", "load", "describe")
        sides = [
            Side("ours", open_ours, (config, bench.steps, folder), ("train_and_save", *turns), shape.ranks),
            Side("reference", open_torch_save, (config, folder), turns, shape.ranks, is_plain=True),
        ]
        at_once = fits_at_once(sides, 2 * tables_gib, shape.batch_size)  # both load or copy what they hold
        results = take_turns([*sides, ceilings_side("fp32")], bench.repetition.rounds, show_turn, at_once=at_once)
    saved_bytes = results["ours"].facts[0]["saved_bytes"]  # rank 0's is of the whole
    seconds = collect_seconds(results["ours"].turns, results["reference"].turns)
    # Of the copy that training waits for, each byte is read once and written once.
    floor = Floor(Work(0, 2 * saved_bytes), best_ceilings(results))
    result: dict[str, Any] = {
        "case": "checkpoint",
        **compare_stalls(seconds, floor),
        **compare_seconds(seconds),
        **weigh_training(results["ours"].turns["train_and_save"]),
        "saved_gib": saved_bytes / 2**30,
        "seconds": {name: summarize(values, saved_bytes / 2**30) for name, values in seconds.items()},
        "sides": {side.name: results[side.name].to_json() for side in sides},
        "disk": disk,
        "bench": asdict(bench),
        "at_once": at_once,
        "config": asdict(config),
    }
    print_durations(seconds, saved_bytes / 2**30)
    print_comparison(result)
    print_floor(floor, Speed(1, [[stall] for stall in seconds["ours: stall"]]), "the stall")
    write_result(bench.repetition.json, result)
    return result


def describe_disk(folder: Path, needed_gib: float) -> str:
    """The folder's file system, in words.

    Raises:
        ConfigError: if it has too little room.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_gib * 2**30:
        raise ConfigError(
            f"{folder.parent}: {show_bytes(free)} free, expected {show_bytes(needed_gib * 2**30)}. "
            "Give smaller tables, or another --folder."
        )
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown file system"
    return f"{folder.parent} ({kind})"


def collect_seconds(
    ours: Mapping[str, Sequence[Any]], reference: Mapping[str, Sequence[Any]]
) -> dict[str, list[float]]:
    """Of everything that was timed, by round, under the names that table and JSON have."""
    beside, loads = ours["train_and_save"], ours["load"]
    return {
        "ours: stall": [turn["stall"] for turn in beside],
        "ours: saved while training": [turn["complete"] for turn in beside],
        "ours: saved, training waits": list(ours["save"]),
        "torch.save": [turn["written"] for turn in reference["save"]],
        "torch.save, fsync": [turn["synced"] for turn in reference["save"]],
        "ours: check": [turn["check"] for turn in loads],
        "ours: restore": [turn["restore"] for turn in loads],
        "ours: check, restore": [turn["check"] + turn["restore"] for turn in loads],
        "torch.load": list(reference["load"]),
    }


def compare_stalls(seconds: Mapping[str, Sequence[float]], floor: Floor) -> dict[str, Any]:
    """The top level of the result: for how much shorter training stands still than with torch.save and fsync."""
    ours, theirs = (Speed(1, [[value] for value in seconds[name]]) for name in ("ours: stall", "torch.save, fsync"))
    return compare(ours, theirs, floor)


def compare_seconds(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The other ratios, each the median over rounds, and its rounds. Above 1: ours is faster."""
    pairs = {
        "ratio_without_fsync": ("torch.save", "ours: stall"),
        "save_ratio": ("torch.save, fsync", "ours: saved, training waits"),
        "load_ratio": ("torch.load", "ours: check, restore"),
        "load_ratio_without_check": ("torch.load", "ours: restore"),
    }
    compared: dict[str, Any] = {}
    for name, (theirs, ours) in pairs.items():
        by_round = [a / b for a, b in zip(seconds[theirs], seconds[ours], strict=True)]
        compared |= {name: statistics.median(by_round), f"{name}_rounds": by_round}
    return compared


def weigh_training(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a save costs training: its rate while one is written over that without, and seconds, stall included."""
    rates, costs = [], []
    for turn in turns:
        quiet = statistics.mean(turn["quiet_steps"])
        whole = turn["writing_steps"][:-1] or turn["writing_steps"]  # the checkpoint is complete within the last one
        rates.append(quiet / statistics.mean(whole))
        costs.append(turn["stall"] + sum(turn["writing_steps"]) - quiet * len(turn["writing_steps"]))
    return {
        "rate_while_writing": statistics.median(rates),
        "rate_while_writing_rounds": rates,
        "cost_seconds": statistics.median(costs),
        "cost_seconds_rounds": costs,
        "steps": [{name: turn[name] for name in ("quiet_steps", "writing_steps")} for turn in turns],
    }


def summarize(values: Sequence[float], gib: float) -> dict[str, Any]:
    """Median and spread of seconds, and the median of a GiB."""
    median = statistics.median(values)
    return {
        "median": median,
        "min": min(values),
        "max": max(values),
        "per_gib": median / gib,
        "rounds": list(values),
    }


def print_comparison(result: Mapping[str, Any]) -> None:
    """The ratios in words, each a median over rounds and its range."""
    first = result["sides"]["ours"]["first_stall_seconds"][0]
    print(
        "\nStall: training that saves in the background stands still for the copy only. torch.save with fsync stops it "
        f"{describe_spread(result['ratios'])} times as long, without fsync "
        f"{describe_spread(result['ratio_without_fsync_rounds'])} times. A run's first copy takes {first:.2f} s."
    )
    print(
        f"While one is written, training runs at {describe_spread(result['rate_while_writing_rounds'])} of its rate. "
        f"All in all a checkpoint costs {describe_spread(result['cost_seconds_rounds'])} s of training."
    )
    print(
        "Save, training waits: ours, with SHA-256 and fsync, takes "
        f"{_times_as_long(result['save_ratio_rounds'])} times as long as torch.save with fsync."
    )
    print(
        f"Load: ours takes {_times_as_long(result['load_ratio_rounds'])} times as long as torch.load, without the "
        f"check of SHA-256 {_times_as_long(result['load_ratio_without_check_rounds'])} times."
    )


def _times_as_long(ratios: Sequence[float]) -> str:
    return describe_spread([1 / ratio for ratio in ratios])


def show_turn(side: str, turn: str, value: Any) -> str | None:
    """A line of progress."""
    if side == "ceilings":
        return None
    parts = value if isinstance(value, dict) else {"": value}
    shown = (f"{name} {part:.2f} s".strip() for name, part in parts.items() if isinstance(part, float))
    return f"{side:<10} {turn:<15} {', '.join(shown)}"
