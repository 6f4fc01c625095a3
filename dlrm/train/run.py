"""Data, plan, model, training, summary: a run's steps, in order. Nothing is written before all of it is checked."""

import dataclasses
import importlib.util
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dlrm.config import Config
from dlrm.console import plural, some
from dlrm.data.binary_days import Stage
from dlrm.errors import ConfigError, RunDirectoryError
from dlrm.freezing import DENSE
from dlrm.launcher import note_separate_launchers
from dlrm.lock import Locks
from dlrm.metrics.evaluation import EvaluationResult
from dlrm.metrics.mlperf import MlperfLog, describe_run
from dlrm.metrics.sinks import Sink, Sinks
from dlrm.runtime import Runtime, on_every_rank, on_main_rank, peak_memory_gib
from dlrm.sharding.plan import Placement
from dlrm.signals import StopSignals
from dlrm.train.assemble import assemble
from dlrm.train.guard import guard
from dlrm.train.initial import describe_origin, read_origin, take_weights
from dlrm.train.profiling import StepProfiler
from dlrm.train.resume import FinishedError, Start, check_left, find_start, resume_training, with_seed_of
from dlrm.train.run_directory import RunDirectory, describe_environment, device_name
from dlrm.train.trainer import Trainer


def run(config: Config, runtime: Runtime, started: float, signals: StopSignals) -> None:
    """Trains, validates and tests. Collective. `started` is when, in seconds since the epoch, the process began.

    Raises:
        DlrmError: for what the user can mend.
        Stopped: when a signal has ended training; what it had reached is saved.
    """
    on_main_rank(runtime, lambda: _check_output(config))
    config = _with_interval(config)
    with Locks() as locks:
        try:
            start = find_start(config, runtime, locks)
        except FinishedError as finished:
            if runtime.is_main:
                print(finished, flush=True)
            return
        config = on_main_rank(runtime, lambda: _with_seed(with_seed_of(config, start.source)))
        _run_from(start, config, runtime, started, signals, locks)


def _run_from(
    start: Start, config: Config, runtime: Runtime, started: float, signals: StopSignals, locks: Locks
) -> None:
    """A run from where it begins, to its summary."""
    if runtime.is_main:
        _note_idle_flags(config, runtime)
        _note_other_ranks(config, runtime)
        if (note := note_separate_launchers()) is not None:
            print(note, flush=True)
    trainer, base = assemble(config, runtime)
    runtime = base.runtime
    check_left(trainer, start)
    position, metrics, taken = start.position, None, []
    origin: dict[str, str] = {}
    if (source := start.source) is not None:
        metrics = resume_training(trainer, source, position, runtime)
        origin = on_main_rank(runtime, partial(read_origin, source))
    elif (initial := start.initial) is not None:
        taken = take_weights(trainer, initial, runtime)
        origin = on_main_rank(runtime, partial(describe_origin, initial))
    directory = on_main_rank(
        runtime,
        lambda: RunDirectory.open(
            start.path,
            config,
            {**describe_environment(runtime, config, start.data, base.folded), **origin},
            base.placement.to_json(),
            locks,
            metrics,
        ),
    )
    rows = {stage: split.partition.num_used_rows for stage, split in trainer.splits.items()}
    if runtime.is_main:
        _announce(config, base.placement, rows)
        print("\n".join(taken), end="\n" if taken else "", flush=True)
    if config.output.profile:
        trainer.profiler = StepProfiler(config.output.profile, directory.path, runtime)
    with _open_sinks(config, runtime, directory, rows, started, base.data_opened) as trainer.sink:
        where = {"epoch": position.epoch, "row": position.row, "has_new_data": start.has_new_data}
        if start.source is not None:
            trainer.write("resume", checkpoint=start.source.address, world_size=runtime.world_size, **where)
        elif start.initial is not None:
            trainer.write("init", checkpoint=start.initial.address)
        with guard(trainer, directory, start, signals) as trainer.safety:
            trainer.train()
            trace = trainer.profiler.close() if trainer.profiler is not None else None
            if runtime.is_main and trace is not None:
                print(trace, flush=True)
            if (frequencies := trainer.splits["train"].frequencies) is not None:
                counts = frequencies.total(runtime)
                on_main_rank(runtime, lambda: directory.write_frequencies(counts))
            test = trainer.test() if config.evaluation.evaluate_on_training_end else None
    summary = summarize(config, runtime, trainer, test)
    if runtime.is_main:
        directory.write_summary(summary)
        print(
            f"Trained on {_describe_samples(trainer, start)} in {trainer.meter.seconds:.1f} s "
            f"({summary['samples_per_second']:,.0f} samples/s, start-up included), peak memory "
            f"{summary['peak_memory_gib']:.2f} GiB a rank. Run directory: {directory.path}",
            flush=True,
        )
        if (target := config.evaluation.validation_auroc) is not None and not trainer.reached_target:
            print(_explain_target(target, [result.auroc for result in trainer.own_results]), flush=True)


def _explain_target(target: float, aurocs: Sequence[float | None]) -> str:
    """Why training has not ended at --validation_auroc."""
    defined = [auroc for auroc in aurocs if auroc is not None]
    if defined:
        return f"The target was not reached: --validation_auroc {target:g}, the best validation has {max(defined):.6f}."
    why = "nothing was validated" if not aurocs else "AUROC is undefined, as the validation set has one class only"
    return f"The target was not reached: --validation_auroc {target:g}, and {why}."


def _describe_samples(trainer: Trainer, start: Start) -> str:
    total, begun = trainer.num_samples, start.position
    parts = []
    if before := trainer.samples_before:
        parts.append(f"{before:,} before this run and {total - before:,} in it")
    if start.is_own:
        parts.append(f"{total - begun.num_samples:,} since it was resumed at step {begun.step:,}")
    return f"{total:,} samples" + (f" ({', '.join(parts)})" if parts else "")


def summarize(config: Config, runtime: Runtime, trainer: Trainer, test: EvaluationResult | None) -> dict[str, Any]:
    """What summary.json holds. Collective: memory is the largest over ranks."""
    peak = torch.tensor(peak_memory_gib(runtime.device), dtype=torch.float64, device=runtime.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    seconds = trainer.meter.seconds
    target = config.evaluation.validation_auroc
    return {
        **{
            f"val_{metric}": [getattr(result, metric) for result in trainer.val_results]
            for metric in ("auroc", "logloss", "ne", "calibration")
        },
        "test_auroc": test and test.auroc,
        "test_logloss": test and test.logloss,
        "test_ne": test and test.ne,
        "test_calibration": test and test.calibration,
        "num_test_samples": test and test.num_samples,
        "num_train_samples": trainer.num_samples,
        "num_train_samples_before": trainer.samples_before,
        "num_foreign_validations": trainer.foreign_validations,
        "num_train_steps": trainer.step,
        "train_seconds": seconds,
        "total_seconds": trainer.seconds,
        "samples_per_second": trainer.num_samples / seconds if seconds else 0.0,
        "target_auroc": target,
        "target_reached": trainer.reached_target if target is not None else None,
        "world_size": runtime.world_size,
        "device": device_name(runtime.device),
        "precision": _precision(config, runtime),
        "seed": config.training.seed,
        "peak_memory_gib": peak.item(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _precision(config: Config, runtime: Runtime) -> str:
    """What matrix products were computed in: a CPU has no tf32."""
    asked = config.training.arithmetic
    return "fp32" if asked == "tf32" and runtime.device.type != "cuda" else asked


@contextmanager
def _open_sinks(
    config: Config, runtime: Runtime, directory: RunDirectory, rows: dict[Stage, int], started: float, opened: float
) -> Iterator[Sink]:
    """What the run's lines go to: on rank 0 metrics.jsonl and the views of it that the flags ask for. Collective."""
    with ExitStack() as stack:

        def open_all() -> list[Sink]:
            sinks: list[Sink] = [directory]
            if config.output.tensorboard:
                from dlrm.metrics.tensorboard import TensorBoardSink

                drawn = TensorBoardSink(directory.path / "tensorboard")
                for line in directory.lines():  # of a run that is resumed
                    drawn.append_metrics(line)
                sinks.append(drawn)
            if config.output.mlperf_log:
                device = device_name(runtime.device)
                facts = describe_run(config, device, runtime.world_size, rows["train"], rows["val"])
                log = MlperfLog(directory.path / "mlperf_log.txt", facts, started, opened)
                sinks.append(stack.enter_context(closing(log)))
            return sinks

        try:
            sinks = on_every_rank(runtime, lambda: open_all() if runtime.is_main else [])
        except RunDirectoryError:
            if runtime.is_main and not directory.lines():
                directory.discard()
            raise
        yield Sinks(sinks)


def _check_output(config: Config) -> None:
    if config.output.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("--tensorboard: the package tensorboard is not installed. Install it, or leave the flag out.")


def _with_interval(config: Config) -> Config:
    """The config, with how often checkpoints are written."""
    every = config.checkpoint.checkpoint_every or ("never" if config.is_random else "30m")
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, checkpoint_every=every))


def _with_seed(config: Config) -> Config:
    """The config with a seed, drawn if it has none."""
    seed = config.training.seed
    drawn = dataclasses.replace(config.training, seed=secrets.randbits(31) if seed is None else seed)
    return dataclasses.replace(config, training=drawn)


def _note_other_ranks(config: Config, runtime: Runtime) -> None:
    """The number of ranks is the launcher's and in no config: says so where a run is started again with another one."""
    if config.config is None:
        return
    try:
        ranks = json.loads(Path(config.config).with_name("environment.json").read_text(encoding="utf-8"))["world_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if ranks != runtime.world_size:
        print(f"{config.config} is of a run of {plural(ranks, 'rank')}; this one has {runtime.world_size:,}.")


def _note_idle_flags(config: Config, runtime: Runtime) -> None:
    """A script written for many GPUs runs unchanged on one CPU, and is told what that leaves out."""
    sharding = config.sharding
    if runtime.world_size == 1 and {sharding.forward_comm_precision, sharding.backward_comm_precision} != {"fp32"}:
        print("One rank: precision of communication without effect.", flush=True)
    if config.training.arithmetic == "tf32" and runtime.device.type != "cuda":
        print("No CUDA device: tf32 without effect.", flush=True)


def _describe_frozen(config: Config) -> str:
    tables, dense = config.frozen_tables, ["all dense layers"] if DENSE in config.frozen else []
    return " and ".join([*([f"{plural(len(tables), 'table')} ({some(tables)})"] if tables else []), *dense])


def _announce(config: Config, placement: Placement, rows: dict[Stage, int]) -> None:
    print(
        f"Seed {config.training.seed}. " + ", ".join(f"{count:,} {stage}" for stage, count in rows.items()) + " rows."
    )
    if config.frozen:
        print(f"Frozen: {_describe_frozen(config)}. Training leaves these weights as they are.")
    if config.is_random:
        print("Random data: nothing in it can be learned, so expect an AUROC of about 0.5.")
    if (rate := config.data.undersampling_rate) is not None:
        print(
            f"Of the training rows with label 0 a share of {rate:.4g} is kept. Validation and test predictions are "
            f"corrected for it: log({rate:.4g}) = {config.data.logit_correction:.4f} is added to each logit."
        )
    if config.output.print_sharding_plan:
        print(placement.to_text())
    print(placement.summary(), flush=True)
