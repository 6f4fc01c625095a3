"""The training loop.

Shapes: B samples of this rank.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import Any

from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.checkpoint.position import Position
from dlrm.config import Config
from dlrm.console import Progress
from dlrm.data.batch import Batch
from dlrm.data.binary_days import Stage
from dlrm.data.partition import Partition
from dlrm.data.splits import Split
from dlrm.metrics.evaluation import EvaluationResult
from dlrm.metrics.sinks import Sink
from dlrm.metrics.training import TrainingMeter, TrainingReport
from dlrm.runtime import Runtime
from dlrm.train.pipeline import build_pipeline
from dlrm.train.profiling import StepProfiler
from dlrm.train.safety import Safety
from dlrm.train.schedule import LearningRateSchedule
from dlrm.train.scoring import Scorer

MAX_STEPS_PER_REPORT = 100
REPORTS_PER_EPOCH = 50


class Trainer:
    """Trains, validates and tests. Every rank has one, and calls the same methods in the same order."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        splits: dict[Stage, Split],
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        sink: Sink,
        profiler: StepProfiler | None = None,
        safety: Safety | None = None,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.splits = splits
        self.model = model
        self.optimizer = optimizer
        self.sink = sink
        self.profiler = profiler
        self.safety = safety or Safety()
        self.pipeline = build_pipeline(config.training.pipeline, model, optimizer, runtime.device)
        self.scorer = Scorer(model, self.pipeline, runtime, config.data.logit_correction, config.output.print_progress)
        self.schedule = LearningRateSchedule(optimizer, config.optimizer)
        self.step = 0
        self.epoch = 0
        self.epoch_step = 0
        """Steps taken of the epoch."""
        self.row = 0
        """Rows taken of the epoch's order."""
        self.validated_step = 0
        self.val_results: list[EvaluationResult] = []
        self.foreign_validations = 0
        self.samples_before = 0
        self.optimizer_steps = 0
        """As `Position` has them."""
        self.steps_per_report = config.output.log_every or max(
            1, min(MAX_STEPS_PER_REPORT, splits["train"].partition.num_steps // REPORTS_PER_EPOCH)
        )
        self.meter = TrainingMeter(self.steps_per_report, runtime.device, runtime.world_size)
        self._shows = runtime.is_main and config.output.print_progress
        self._started = time.perf_counter()

    def train(self) -> None:
        """All epochs that are left, with the validations and checkpoints that are due.

        Raises:
            DivergedError: when a loss or a score is not finite.
            DatasetError: when mapped data turns out to be wrong.
            CheckpointError: when a checkpoint can't be written.
            Stopped: when a signal has ended training; what it had reached is saved.
        """
        if self.step == 0:
            self._started = time.perf_counter()
        while self.epoch < self.config.training.epochs and not self.reached_target:
            self._train_epoch()
        self.safety.end_training(self)
        self.write("train_stop", reached_target=self.reached_target)

    def _train_epoch(self) -> None:
        """What is left of an epoch. The pipeline runs dry before each validation and is filled again after it."""
        split = self.splits["train"].resumed(self.row, self.epoch_step)
        steps = split.partition.num_steps
        if self.epoch_step == 0:
            self.write("epoch_start", epoch=self.epoch)
        batches = self.safety.watched(split.batches(self.epoch), "training")
        every = self.config.evaluation.validation_freq_within_epoch or max(1, steps)
        with closing(Progress(f"Epoch {self.epoch}", steps, "steps", self._shows, self.epoch_step)) as progress:
            while True:
                if self._validation_is_due(steps):
                    paused = time.perf_counter()
                    self._validate(progress)
                    progress.pause(time.perf_counter() - paused)
                if self.epoch_step == steps or self.reached_target:
                    break
                stop = min(steps, (self.epoch_step // every + 1) * every)
                self._train_steps(islice(batches, stop - self.epoch_step), stop, split.partition, progress)
        self.write("epoch_stop", epoch=self.epoch)
        if self.epoch_step == steps:
            self.epoch += 1
            self.row = self.epoch_step = 0

    def _validation_is_due(self, steps: int) -> bool:
        """Whether one is, in an epoch of so many steps, at the step that was just taken."""
        if self.epoch_step == 0 or self.validated_step == self.step:
            return False
        every = self.config.evaluation.validation_freq_within_epoch
        within = every is not None and self.epoch_step % every == 0
        return within or (self.epoch_step == steps and self.config.evaluation.evaluate_on_epoch_end)

    def _train_steps(self, batches: Iterator[Batch], stop: int, partition: Partition, progress: Progress) -> None:
        """Steps of the epoch up to `stop`."""
        frequencies = self.splits["train"].frequencies
        self.model.train()
        self.pipeline.reset()
        self.meter.resume_clock()
        while self.epoch_step < stop:
            self.schedule.begin_step(self.step + 1)
            if self.config.output.print_lr and self.runtime.is_main:
                self._print_learning_rates(progress)
            loss, _, _ = self.pipeline.progress(batches)
            rows = partition.span(self.epoch_step, self.runtime.rank).global_rows
            self.step += 1
            self.epoch_step += 1
            self.row = partition.rows_before(self.epoch_step)
            if self.profiler is not None:
                self.profiler.advance()
            if frequencies is not None:
                frequencies.count()
            self.meter.update(self.step, loss, rows)
            is_due = self.meter.is_full or self.epoch_step == stop
            progress.advance(note=self._report(self.meter.drain()) if is_due else "")
            self.safety.after_step(self, before_validation=self._validation_is_due(partition.num_steps))

    def _report(self, report: TrainingReport) -> str:
        """Writes a report to the sink; returns it in words."""
        rate = self.schedule.learning_rate
        last = self.own_results[-1].auroc if self.own_results else None
        auroc = "-" if last is None else f"{last:.6f}"
        dense_rate = self.schedule.dense_learning_rate
        self.write("train", epoch=self.epoch, **asdict(report), learning_rate=rate, dense_learning_rate=dense_rate)
        return f"{report.samples_per_second:,.0f} samples/s | loss {report.loss:.5f} | lr {rate:g} | val AUROC {auroc}"

    def _validate(self, progress: Progress) -> None:
        result = self.evaluate("val")
        is_best = result.auroc is not None and all(result.auroc > (past.auroc or 0.0) for past in self.own_results)
        self.val_results.append(result)
        self.validated_step = self.step
        if self.runtime.is_main:
            progress.print(f"AUROC over val set: {result.describe()}")
        if self.reached_target and self.runtime.is_main:
            progress.print(
                f"Validation AUROC {result.auroc:.6f} reached the target {self.config.evaluation.validation_auroc:g} "
                f"after {self.num_samples:,} samples and {self.seconds:.1f} s."
            )
        self.safety.after_validation(self, is_best=is_best)

    def test(self) -> EvaluationResult:
        """Scores the test set."""
        result = self.evaluate("test")
        if self.runtime.is_main:
            print(f"AUROC over test set: {result.describe()}", flush=True)
        return result

    def evaluate(self, stage: Stage) -> EvaluationResult:
        """Scores every row of a split exactly once, over all ranks. Collective.

        Raises:
            DivergedError: if a score is not finite.
        """
        self.write(f"{stage}_start")
        split = self.splits[stage]
        batches = self.safety.watched(split.batches(), "evaluating")
        result = self.scorer.score(stage, split.partition, batches, lambda: self.safety.within_evaluation(self))
        self.write(stage, **asdict(result))
        return result

    @property
    def num_samples(self) -> int:
        """Trained on, over all ranks."""
        return self.meter.num_samples

    @property
    def reached_target(self) -> bool:
        """Whether a validation has come to --validation_auroc."""
        target = self.config.evaluation.validation_auroc
        return target is not None and any((result.auroc or 0.0) >= target for result in self.own_results)

    @property
    def own_results(self) -> list[EvaluationResult]:
        """Validations on this data."""
        return self.val_results[self.foreign_validations :]

    @property
    def seconds(self) -> float:
        """Since training began, validations included, and time before it was resumed."""
        return time.perf_counter() - self._started

    def position(self) -> Position:
        """All of the training's state but its tensors. Collective.

        Raises:
            DivergedError: if a loss that is not reported yet is not finite.
        """
        return Position(
            step=self.step,
            epoch=self.epoch,
            epoch_step=self.epoch_step,
            row=self.row,
            num_samples=self.num_samples,
            validated_step=self.validated_step,
            train_seconds=self.meter.elapsed_seconds(),
            total_seconds=self.seconds,
            pending=self.meter.pending(),
            validations=tuple(asdict(result) for result in self.val_results),
            foreign_validations=self.foreign_validations,
            samples_before=self.samples_before,
            optimizer_steps=self.optimizer_steps,
        )

    def resume(self, position: Position) -> None:
        """Goes on from there; the model and the optimizer have been restored.

        Raises:
            TypeError: if its validations have other metrics.
        """
        self.step, self.epoch, self.epoch_step = position.step, position.epoch, position.epoch_step
        self.row, self.validated_step = position.row, position.validated_step
        self.val_results = [EvaluationResult(**result) for result in position.validations]
        self.foreign_validations, self.samples_before = position.foreign_validations, position.samples_before
        self.optimizer_steps = position.optimizer_steps
        self.meter.restore(position.num_samples, position.train_seconds, position.pending)
        self._started = time.perf_counter() - position.total_seconds

    def write(self, kind: str, **fields: Any) -> None:
        """Writes a line to the sink."""
        where = {"kind": kind, "step": self.step, "num_train_samples": self.num_samples}
        self.sink.append_metrics({**where, **fields, "elapsed_seconds": round(self.seconds, 3)})

    def _print_learning_rates(self, progress: Progress) -> None:
        rates = {"tables": self.schedule.learning_rate, "dense": self.schedule.dense_learning_rate}
        for group, rate in rates.items():
            progress.print(f"lr: {self.step} {group} {rate:.6f}")
