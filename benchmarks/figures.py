"""What was run here, in words: one figure for each committed result."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.soak import FREE_GROWTH

Result = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """What was measured, the file that has it all, and how that becomes words.

    Attributes:
        what: with `{name}` for what the file has under that name.
    """

    what: str
    file: str
    draw: Callable[[Result], str]


def _quality(result: Result) -> str:
    stages = []
    for stage in ("val", "test"):
        values = [run[stage] for run in result["runs"]]
        stages.append(f"{stage} {statistics.mean(values):.4f} ({statistics.stdev(values):.4f})")
    return ", ".join(stages)


def _against_plain(result: Result) -> str:
    stages = []
    for stage in ("val", "test"):
        pairs = zip(result["runs"], result["plain"]["runs"], strict=True)
        differences = [own[stage] - plain[stage] for own, plain in pairs]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        stages.append(f"{stage} {statistics.mean(differences):+.4f} ({error:.4f})")
    return f"{', '.join(stages)}; {len(result['runs'])} seeds"


def _planted(result: Result) -> str:
    last, best = result["curve"][-1], result["truth"]["val_auroc"]
    return (
        f"val {last['auroc']:.4f} after {last['samples']:,} samples (best possible {best:.4f}); "
        f"{result['target']} after {result['samples_to_target']:,}; [curve](planted_curve.md)"
    )


def _preprocess_speed(result: Result) -> str:
    low, high = min(result["ratios"]), max(result["ratios"])
    return (
        f"{result['ratio']:.0f} times ({low:.0f} to {high:.0f}) from parsing through shuffling, "
        f"{result['ratio_of_whole_process']:.0f} times the whole process"
    )


def _preprocess_memory(result: Result) -> str:
    peaks = ", ".join(
        f"{run['peak_memory_gib']:.2f} GiB at {run['rows'] / 1e6:.0f} million" for run in result["by_rows"]
    )
    distinct = result["distinct_ids"]
    return (
        f"{peaks} rows; {distinct['peak_memory_gib']:.2f} GiB at {distinct['distinct'] / 1e6:.0f} million distinct ids "
        f"of a column, limit {distinct['memory_gib']:g} GiB"
    )


def _preprocess_kills(result: Result) -> str:
    return f"{len(result['kills'])} kills, the same bytes: {'every time' if result['same'] else 'NOT every time'}"


def _kills(result: Result) -> str:
    runs = result["runs"]
    kinds = list(dict.fromkeys(run["kind"] for run in runs))
    counts = ", ".join(f"{kind} {sum(run['kind'] == kind for run in runs)}" for kind in kinds)
    writing = sum(run["while_writing"] for run in runs)
    same = sum(run["same"] for run in runs)
    return f"{same} of {len(runs)} resumed to the same bits ({counts}; {writing} while a checkpoint was being written)"


def _checkpoint(result: Result) -> str:
    low, high = 1 / max(result["ratios"]), 1 / min(result["ratios"])
    return (
        f"training stands still {1 / result['ratio']:.3f} times as long ({low:.3f} to {high:.3f}); while one is "
        f"written it runs at {result['rate_while_writing']:.2f} of its rate; saving with training waiting, SHA-256 "
        f"included, takes {1 / result['save_ratio']:.1f} times as long; loading with SHA-256 checked "
        f"{1 / result['load_ratio']:.2f} times, without {1 / result['load_ratio_without_check']:.2f} times"
    )


def _soak(result: Result) -> str:
    def most(measure: str) -> Result:
        own = (trend for trend in result["trends"] if trend["measure"] == measure)
        return max(own, key=lambda trend: trend["growth"])

    memory, handles, threads = map(most, FREE_GROWTH)
    share, mib = FREE_GROWTH["rss_mib"]
    noise = f"up to {share * memory['warm'] + mib:.0f} MiB, {share:.0%} + {mib:g} MiB, counts as noise"
    grown = any(trend["has_grown"] for trend in result["trends"])
    return (
        f"{result['checkpoints']:,} checkpoints, {result['validations']:,} validations; a rank's memory "
        f"{memory['growth']:+.1f} MiB ({noise}), handles {handles['growth']:+.0f}, threads {threads['growth']:+.0f}: "
        f"{'GROWS' if grown else 'no growth'}"
    )


def _neighbour(result: Result) -> str:
    rows = result["summary"]
    theirs, ours, plain = rows["300000"], rows["1000"], rows["plain"]
    return (
        f"{ours['slowdown']:.1f} times as long; {theirs['slowdown']:.1f} with libgomp's 300,000 spins, "
        f"{plain['slowdown']:.1f} in plain TorchRec. Beside it {ours['speed beside one']:.1f} times the speed that "
        f"300,000 spins give, alone {ours['speed alone']:.2f} times"
    )


def _startup(result: Result) -> str:
    ratios = result["ratios_to_import_torch"]
    return (
        f"`dlrm_main.py --help` {ratios['dlrm_main.py --help']:.2f}, `dlrm --help` {ratios['dlrm --help']:.2f}; first "
        f"training step on top of imports {ratios['on top of imports, 1 process']:.1f} (one process), "
        f"{ratios['on top of imports, 2 ranks']:.1f} (two ranks)"
    )


def _bench(result: Result) -> str:
    low, high = min(result["ratios"]), max(result["ratios"])
    speed = f"{result['ratio']:.1f} times ({low:.1f} to {high:.1f}), {result['share_of_floor']:.0%} of the floor"
    if "over_training" not in result:
        return speed
    over = result["over_training"]
    return f"{speed}; {f'{over:,.0f}' if over >= 100 else f'{over:.1f}'} times the rate of training"


def _overlap(result: Result) -> str:
    def spread(side: str, name: str) -> str:
        values = result["rounds"][side][name]
        return f"{statistics.median(values):.0%} ({min(values):.0%} to {max(values):.0%})"

    shown = [f"{spread(side, 'input_all_to_all_hidden')} with the pipeline {side}" for side in ("on", "off")]
    return ", ".join(shown)


FIGURES = (
    Figure(
        "AUROC on 120,000 real rows, `--recipe kaggle_sample`, five seeds: mean (standard deviation)",
        "quality_kaggle_sample.json",
        _quality,
    ),
    Figure("the same in bf16", "quality_kaggle_sample_bf16.json", _quality),
    Figure("the same through torchrec's preprocessing", "quality_kaggle_sample_torchrec.json", _quality),
    Figure(
        "AUROC in int8 less that of plain operators in fp32, same rows and recipe: mean over seeds (standard error)",
        "quality_int8_sample.json",
        _against_plain,
    ),
    Figure("the same on planted days of 3 million rows", "quality_int8_planted.json", _against_plain),
    Figure("planted days, one epoch, one seed: AUROC; samples to the target", "planted_curve.json", _planted),
    Figure("preprocessing against torchrec's three functions, two workers", "preprocess_speed.json", _preprocess_speed),
    Figure("peak memory of preprocessing", "preprocess_memory.json", _preprocess_memory),
    Figure("preprocessing ended by `kill -9` and resumed", "preprocess_kills.json", _preprocess_kills),
    Figure("training of two ranks ended by `kill -9` and resumed", "kills.json", _kills),
    Figure("checkpoints against `torch.save` with fsync", "checkpoint.json", _checkpoint),
    Figure(
        "a checkpoint every 100 steps, an hour at `--hang_timeout 1`, two ranks: growth after the warm-up",
        "soak.json",
        _soak,
    ),
    Figure("rows read from mapped days, against TorchRec's reader", "loader.json", _bench),
    Figure("an evaluation, against TorchRec with torchmetrics", "evaluate.json", _bench),
    Figure("pairwise dots, forward and backward, batch 4,096, against TorchRec's module", "interaction.json", _bench),
    Figure("table lookup, backward and update, against FBGEMM", "embedding.json", _bench),
    Figure("the MLPs' products through {precision}, against `torch.mm` in fp32", "products.json", _bench),
    Figure("start, over the time of `import torch`", "startup.json", _startup),
    Figure(
        "a step of 512 samples beside a busy process on one of two cores, with the 1,000 spins that are set",
        "neighbour.json",
        _neighbour,
    ),
    Figure("input all-to-all hidden behind compute, two ranks on a CPU", "overlap.json", _overlap),
)
