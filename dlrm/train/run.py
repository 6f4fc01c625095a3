"""Data, plan, model, training, summary: a run's steps, in order. Nothing is written before all of it is checked."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from dlrm.assembly.foundation import Foundation, lay_foundation
from dlrm.checkpoint import run_files
from dlrm.checkpoint.position import Position
from dlrm.config.config import Config
from dlrm.config.frozen import DENSE
from dlrm.dataset.binary_days import Stage
from dlrm.errors import ConfigError, RunDirectoryError
from dlrm.metrics.journal import Journal
from dlrm.metrics.mlperf import MlperfLog, describe_run
from dlrm.metrics.sinks import Sink, Sinks
from dlrm.ranks.launcher import note_separate_launchers
from dlrm.ranks.runtime import Runtime, on_every_rank, on_main_rank
from dlrm.sharding.placement import Placement
from dlrm.system.console import plural, some
from dlrm.system.lock import Locks
from dlrm.system.signals import StopSignals
from dlrm.train.environment import describe_environment
from dlrm.train.guard import open_hooks
from dlrm.train.initial import describe_origin, read_origin, take_weights
from dlrm.train.profiling import StepProfiler
from dlrm.train.resume import FinishedError, Start, check_left, find_start, restore_training
from dlrm.train.run_directory import RunDirectory
from dlrm.train.summary import describe_samples, explain_target, summarize
from dlrm.train.trainer import Trainer


def run(config: Config, runtime: Runtime, started: float, signals: StopSignals) -> None:
    """Trains, validates and tests. Collective. `started` is when, in seconds since the epoch, the process began.

    Raises:
        DlrmError: if the user can fix it.
        Stopped: when a signal has ended training; what it had reached is saved.
    """
    on_main_rank(runtime, lambda: _check_output(config))
    with Locks() as locks:
        try:
            start = find_start(config, runtime, locks)
        except FinishedError as finished:
            if runtime.is_main:
                print(finished, flush=True)
            return
        saved = None if start.source is None else start.source.config
        resolved = on_main_rank(runtime, lambda: config.resolve(saved))  # one rank draws the seed of all
        _run_from(start, resolved, runtime, started, signals, locks)


def _run_from(
    start: Start, config: Config, runtime: Runtime, started: float, signals: StopSignals, locks: Locks
) -> None:
    """Runs from `start` to the summary."""
    if runtime.is_main:
        _note_idle_flags(config, runtime)
        _note_other_ranks(config, runtime)
        if (note := note_separate_launchers()) is not None:
            print(note, flush=True)
    base = lay_foundation(config, runtime)
    check_left(base, start)
    position, metrics, taken, origin = _fill(base, start)
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
    rows = {stage: split.partition.num_used_rows for stage, split in base.splits.items()}
    if runtime.is_main:
        _announce(config, base.placement, rows)
        print("\n".join(taken), end="\n" if taken else "", flush=True)
    steps = config.output.profile
    profiler = StepProfiler(steps, directory.path, runtime) if steps else None
    with _open_sinks(config, runtime, directory, rows, started, base.data_opened) as sink:
        journal = Journal(sink, position.total_seconds)
        where = {"epoch": position.epoch, "row": position.row, "has_new_data": start.has_new_data}
        if start.source is not None:
            journal.write("resume", position, checkpoint=start.source.address, world_size=runtime.world_size, **where)
        elif start.initial is not None:
            journal.write("init", position, checkpoint=start.initial.address)
        with open_hooks(base, directory, start, signals, journal) as hooks:
            trainer = Trainer(base, journal, position, hooks, profiler)
            trainer.train()
            trace = profiler.close() if profiler is not None else None
            if runtime.is_main and trace is not None:
                print(trace, flush=True)
            if (frequencies := base.splits["train"].frequencies) is not None:
                counts = frequencies.total(runtime)
                on_main_rank(runtime, lambda: directory.write_frequencies(counts))
            test = trainer.test() if config.evaluation.evaluate_on_training_end else None
            hooks.close(trainer.position)
    summary = summarize(config, runtime, trainer, journal, test)
    if runtime.is_main:
        directory.write_summary(summary)
        print(
            f"Trained on {describe_samples(trainer.position, start)} in {trainer.train_seconds:.1f} s "
            f"({summary['samples_per_second']:,.0f} samples/s, start-up included), peak memory "
            f"{summary['peak_memory_gib']:.2f} GiB a rank. Run directory: {directory.path}",
            flush=True,
        )
        if (target := config.evaluation.validation_auroc) is not None and not trainer.reached_target:
            print(explain_target(target, trainer.position.own_aurocs), flush=True)


def _fill(base: Foundation, start: Start) -> tuple[Position, bytes | None, list[str], dict[str, str]]:
    """Fills the model from the checkpoint that a run begins with, if there is one. Collective.

    Returns:
        Where training begins; metrics up to there; what was taken, in lines; where the first weights are from.
    """
    if (source := start.source) is not None:
        metrics = restore_training(base, source, start.position)
        return start.position, metrics, [], on_main_rank(base.runtime, partial(read_origin, source))
    if (initial := start.initial) is not None:
        position, taken = take_weights(base, initial)
        return position, None, taken, on_main_rank(base.runtime, partial(describe_origin, initial))
    return start.position, None, [], {}


@contextmanager
def _open_sinks(
    config: Config, runtime: Runtime, directory: RunDirectory, rows: dict[Stage, int], started: float, opened: float
) -> Iterator[Sink]:
    """Opens what lines of metrics are written to: on rank 0 metrics.jsonl, and what the flags add. Collective."""
    with ExitStack() as stack:

        def open_all() -> list[Sink]:
            sinks: list[Sink] = [directory]
            if config.output.tensorboard:
                from dlrm.metrics.tensorboard import TensorBoardSink

                drawn = TensorBoardSink(directory.path / run_files.TENSORBOARD)
                for line in directory.lines():  # of a run that is resumed
                    drawn.append_metrics(line)
                sinks.append(drawn)
            if config.output.mlperf_log:
                device = runtime.device_name
                facts = describe_run(config, device, runtime.world_size, rows["train"], rows["val"])
                log = MlperfLog(directory.path / run_files.MLPERF_LOG, facts, started, opened)
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


def _note_other_ranks(config: Config, runtime: Runtime) -> None:
    """Notes if a run is repeated on another number of ranks: the launcher sets that, not config.json."""
    if config.config is None:
        return
    try:
        ranks = json.loads(Path(config.config).with_name(run_files.ENVIRONMENT).read_text(encoding="utf-8"))[
            "world_size"
        ]
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
