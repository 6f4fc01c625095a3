"""Data, plan, model, training, summary: a run's steps, in order. Nothing is written before all of it is checked."""

import dataclasses
import secrets
import time
from typing import Any

import torch
import torch.distributed as dist

from dlrm.config import Config
from dlrm.data.splits import open_run_splits
from dlrm.metrics.evaluation import EvaluationResult
from dlrm.model.dlrm import DLRM, DLRMTrain
from dlrm.runtime import Runtime, derive_seed, on_every_rank, on_main_rank, peak_memory_gib
from dlrm.sharding.plan import DeviceMemory, Placement, describe_plan, plan_sharding
from dlrm.sharding.shard import shard_model
from dlrm.train.optimizers import build_optimizer, fuse_table_optimizer, table_state_floats_per_weight
from dlrm.train.pipeline import check_pipeline
from dlrm.train.profiling import StepProfiler, check_profile
from dlrm.train.run_directory import RunDirectory, describe_environment, device_name
from dlrm.train.trainer import Trainer


def run(config: Config, runtime: Runtime) -> None:
    """Trains, validates and tests. Collective.

    Raises:
        DlrmError: for what the user can mend.
    """
    config = on_main_rank(runtime, lambda: _with_seed(config))
    path = on_main_rank(runtime, lambda: RunDirectory.check(config))
    assert config.training.seed is not None
    if runtime.is_main:
        print(runtime.describe(), flush=True)
        _note_flags_without_gpu(config, runtime)
    torch.backends.cuda.matmul.allow_tf32 = config.training.allow_tf32

    model = build_model(config, runtime)
    memory = DeviceMemory.detect(runtime)
    prefetches = config.training.pipeline == "prefetch"
    plan = on_main_rank(
        runtime,
        lambda: plan_sharding(
            model,
            memory,
            runtime.world_size,
            runtime.local_world_size,
            max(config.data.batch_size, config.data.test_batch_size or 0),
            prefetches=prefetches,
        ),
    )
    placement = describe_plan(plan, model, runtime.world_size, table_state_floats_per_weight(config.optimizer))
    on_main_rank(runtime, lambda: check_pipeline(config.training.pipeline, placement, runtime.device))
    splits = on_every_rank(runtime, lambda: open_run_splits(config, runtime))
    on_main_rank(runtime, lambda: check_profile(config, splits["train"].partition.num_steps))
    sharded = shard_model(model, plan, runtime.device, config.training.seed, prefetches=prefetches)
    optimizer = build_optimizer(sharded, config.optimizer)

    directory = on_main_rank(
        runtime,
        lambda: RunDirectory.create(path, config, describe_environment(runtime, config), placement.to_json()),
    )
    if runtime.is_main:
        _announce(config, placement, {stage: split.partition.num_used_rows for stage, split in splits.items()})
    profiler = StepProfiler(config.output.profile, directory.path, runtime) if config.output.profile else None
    trainer = Trainer(config, runtime, splits, sharded, optimizer, directory if runtime.is_main else None, profiler)
    trainer.train()
    trace = profiler.close() if profiler is not None else None
    if runtime.is_main and trace is not None:
        print(trace, flush=True)
    test = trainer.test() if config.evaluation.evaluate_on_training_end else None
    summary = summarize(config, runtime, trainer, test)
    if runtime.is_main:
        directory.write_summary(summary)
        print(
            f"Trained on {trainer.num_samples:,} samples in {trainer.meter.seconds:.1f} s "
            f"({summary['samples_per_second']:,.0f} samples/s, start-up included), peak memory "
            f"{summary['peak_memory_gib']:.2f} GiB a rank. Run directory: {directory.path}",
            flush=True,
        )


def build_model(config: Config, runtime: Runtime) -> DLRMTrain:
    """The model before sharding: dense parts on the device, tables without memory, their optimizer attached."""
    assert config.training.seed is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.training.seed, "dense"))
        model = DLRM(config.model, tables_device=torch.device("meta"))
    for name, part in model.named_children():
        if name != "embedding_bag_collection":
            part.to(runtime.device)
    fuse_table_optimizer(model.embedding_bag_collection, config.optimizer)
    return DLRMTrain(model, runtime.world_size)


def summarize(config: Config, runtime: Runtime, trainer: Trainer, test: EvaluationResult | None) -> dict[str, Any]:
    """What summary.json holds. Collective: memory is the largest over ranks."""
    peak = torch.tensor(peak_memory_gib(runtime.device), dtype=torch.float64, device=runtime.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    seconds = trainer.meter.seconds
    target = config.evaluation.validation_auroc
    return {
        "val_auroc": [result.auroc for result in trainer.val_results],
        "test_auroc": test and test.auroc,
        "test_logloss": test and test.logloss,
        "test_ne": test and test.ne,
        "test_calibration": test and test.calibration,
        "num_test_samples": test and test.num_samples,
        "num_train_samples": trainer.num_samples,
        "num_train_steps": trainer.step,
        "train_seconds": seconds,
        "total_seconds": trainer.seconds,
        "samples_per_second": trainer.num_samples / seconds if seconds else 0.0,
        "target_auroc": target,
        "target_reached": trainer.reached_target if target is not None else None,
        "world_size": runtime.world_size,
        "device": device_name(runtime.device),
        "precision": "tf32" if config.training.allow_tf32 and runtime.device.type == "cuda" else "fp32",
        "seed": config.training.seed,
        "peak_memory_gib": peak.item(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _with_seed(config: Config) -> Config:
    if config.training.seed is not None:
        return config
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=secrets.randbits(31)))


def _note_flags_without_gpu(config: Config, runtime: Runtime) -> None:
    """A script written for GPUs runs unchanged on a CPU, and is told what that leaves out."""
    idle = [
        flag
        for flag, given in (("--pin_memory", config.data.pin_memory), ("--allow_tf32", config.training.allow_tf32))
        if given and runtime.device.type != "cuda"
    ]
    if idle:
        print(f"No CUDA device: {' and '.join(idle)} without effect.", flush=True)


def _announce(config: Config, placement: Placement, rows: dict[Any, int]) -> None:
    print(
        f"Seed {config.training.seed}. " + ", ".join(f"{count:,} {stage}" for stage, count in rows.items()) + " rows."
    )
    if config.is_random:
        print("Random data: nothing in it can be learned, so expect an AUROC of about 0.5.")
    if config.output.print_sharding_plan:
        print(placement.to_text())
    print(placement.summary(), flush=True)
