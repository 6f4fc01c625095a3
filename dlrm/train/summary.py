"""The end of a run: summary.json, and the last lines on the screen."""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from dlrm.checkpoint.position import Position
from dlrm.config.config import Config
from dlrm.metrics.evaluation import EvaluationResult
from dlrm.metrics.journal import Journal
from dlrm.ranks.runtime import Runtime, peak_memory_gib
from dlrm.train.resume import Start
from dlrm.train.trainer import Trainer


def explain_target(target: float, aurocs: Sequence[float | None]) -> str:
    """Why training has not ended at --validation_auroc."""
    defined = [auroc for auroc in aurocs if auroc is not None]
    if defined:
        return f"The target was not reached: --validation_auroc {target:g}, the best validation has {max(defined):.6f}."
    why = "nothing was validated" if not aurocs else "AUROC is undefined, as the validation set has one class only"
    return f"The target was not reached: --validation_auroc {target:g}, and {why}."


def describe_samples(position: Position, start: Start) -> str:
    """How many samples a training has seen, before this run and in it."""
    total, begun = position.num_samples, start.position
    parts = []
    if before := position.samples_before:
        parts.append(f"{before:,} before this run and {total - before:,} in it")
    if start.is_own:
        parts.append(f"{total - begun.num_samples:,} since it was resumed at step {begun.step:,}")
    return f"{total:,} samples" + (f" ({', '.join(parts)})" if parts else "")


def summarize(
    config: Config, runtime: Runtime, trainer: Trainer, journal: Journal, test: EvaluationResult | None
) -> dict[str, Any]:
    """The content of summary.json. Collective: it takes the largest memory over ranks."""
    peak = torch.tensor(peak_memory_gib(runtime.device), dtype=torch.float64, device=runtime.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    position, seconds = trainer.position, trainer.train_seconds
    target = config.evaluation.validation_auroc
    return {
        **{
            f"val_{metric}": [validation[metric] for validation in position.validations]
            for metric in ("auroc", "logloss", "ne", "calibration")
        },
        "test_auroc": test and test.auroc,
        "test_logloss": test and test.logloss,
        "test_ne": test and test.ne,
        "test_calibration": test and test.calibration,
        "num_test_samples": test and test.num_samples,
        "num_train_samples": position.num_samples,
        "num_train_samples_before": position.samples_before,
        "num_foreign_validations": position.foreign_validations,
        "num_train_steps": position.step,
        "train_seconds": seconds,
        "total_seconds": journal.seconds,
        "samples_per_second": position.num_samples / seconds if seconds else 0.0,
        "target_auroc": target,
        "target_reached": trainer.reached_target if target is not None else None,
        "world_size": runtime.world_size,
        "device": runtime.device_name,
        "precision": _precision(config, runtime),
        "seed": config.training.seed,
        "peak_memory_gib": peak.item(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _precision(config: Config, runtime: Runtime) -> str:
    """The number format of matrix products: a CPU has no tf32."""
    asked = config.training.arithmetic
    return "fp32" if asked == "tf32" and runtime.device.type != "cuda" else asked
