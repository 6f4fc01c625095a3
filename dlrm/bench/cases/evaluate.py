"""`dlrm bench evaluate`: a pass over held-out samples, to its metrics."""

import statistics
from dataclasses import asdict, replace
from typing import Any

from dlrm.bench.cases.train import count_distinct_rows, describe_sides, make_sides
from dlrm.bench.harness.ceilings import ceilings_side
from dlrm.bench.harness.flags import WARM_UP_STEPS, EvaluateBench
from dlrm.bench.harness.floor import Floor
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.report import Speed, compare, describe_spread, print_floor, print_means, print_speeds, ratios
from dlrm.bench.harness.rounds import best_ceilings, fits_at_once, take_turns
from dlrm.bench.harness.shape import NUM_CACHED_BATCHES, make_config, memory_gib
from dlrm.cost.least_work import least_evaluation_work


def run(bench: EvaluateBench) -> dict[str, Any]:
    """Measures, prints, writes; returns the result.

    Raises:
        DlrmError: what a side raised.
    """
    shape = bench.shape
    steps = bench.steps or shape.steps_per_turn
    config = make_config(shape, WARM_UP_STEPS + steps)
    config = replace(config, data=replace(config.data, limit_val_batches=steps))
    print(describe_sides(shape), flush=True)
    ours, reference = make_sides(config, shape, ("train", "evaluate", "describe"))
    sides = [ours, replace(reference, turns=("evaluate", "describe"))]
    samples = {"train": shape.batch_size, "evaluate": shape.batch_size * steps}

    def show(side: str, turn: str, value: Any) -> str | None:
        rate = f"{samples[turn] * len(value) / sum(value):>11,.0f} samples/s" if turn in samples else None
        return rate and f"{side:<10} {turn:<9} {rate}"

    at_once = fits_at_once(sides, memory_gib(config, shape.optimizer), shape.batch_size)
    results = take_turns([*sides, ceilings_side(shape.arithmetic)], bench.repetition.rounds, show, at_once=at_once)
    training = Speed(shape.batch_size, results["ours"].turns["train"])
    speeds = {side.name: Speed(samples["evaluate"], results[side.name].turns["evaluate"]) for side in sides}
    rows = count_distinct_rows(config, min(samples["evaluate"], NUM_CACHED_BATCHES * shape.batch_size))
    floor = Floor(least_evaluation_work(config.model, samples["evaluate"], rows), best_ceilings(results))
    over_training = ratios(speeds["ours"], training)
    result: dict[str, Any] = {
        "case": "evaluate",
        **compare(speeds["ours"], speeds["reference"], floor),
        "over_training": statistics.median(over_training),
        "over_training_rounds": over_training,
        "sides": {name: {**results[name].to_json(), **speed.to_json()} for name, speed in speeds.items()},
        "training": training.to_json(),
        "bench": asdict(bench),
        "precision": shape.arithmetic,
        "config": asdict(config),
    }
    print_speeds({"our training": training, "our evaluation": speeds["ours"], "reference": speeds["reference"]})
    print(f"ratio by round: {describe_spread(result['ratios'])}; over our training: {describe_spread(over_training)}")
    print_floor(floor, speeds["ours"], "a pass")
    print_means("ours", result["sides"]["ours"])
    write_result(bench.repetition.json, result)
    return result
