"""The training loop.

Shapes: B samples of this rank.
"""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from itertools import islice

from dlrm.assembly.foundation import Foundation
from dlrm.checkpoint.position import Position
from dlrm.checkpoint.tensors import State
from dlrm.dataset.binary_days import Stage
from dlrm.errors import DatasetError
from dlrm.evaluate.scorer import Scorer
from dlrm.fault_tolerance.hooks import Hooks
from dlrm.loader.batch import Batch
from dlrm.metrics.evaluation import EvaluationResult
from dlrm.metrics.journal import Journal
from dlrm.metrics.training import TrainingMeter, TrainingReport
from dlrm.system.console import Progress
from dlrm.train.profiling import StepProfiler
from dlrm.train.schedule import LearningRateSchedule

MAX_STEPS_PER_REPORT = 100
REPORTS_PER_EPOCH = 50


class Trainer:
    """Trains, validates and tests. Every rank has one, and calls the same methods in the same order.

    Attributes:
        position: steps, rows and validations so far. `snapshot` adds the times, and the losses not reported yet.
    """

    def __init__(
        self,
        foundation: Foundation,
        journal: Journal,
        position: Position | None = None,
        hooks: Hooks | None = None,
        profiler: StepProfiler | None = None,
    ) -> None:
        """A trainer that begins at `position`; the model and the optimizer are as they are there."""
        config, runtime = foundation.config, foundation.runtime
        self._foundation, self._config, self._runtime = foundation, config, runtime
        self._model, self._pipeline, self._split = foundation.model, foundation.pipeline, foundation.splits["train"]
        self.position = position or Position()
        self._journal = journal
        self._hooks = hooks or Hooks()
        self._profiler = profiler
        self._scorer = Scorer(foundation)
        self._schedule = LearningRateSchedule(foundation.optimizer, config.optimizer)
        self._meter = TrainingMeter(
            config.output.log_every
            or max(1, min(MAX_STEPS_PER_REPORT, self._split.partition.num_steps // REPORTS_PER_EPOCH)),
            runtime.device,
            runtime.world_size,
            self.position.train_seconds,
            self.position.pending,
        )
        self._shows = runtime.is_main and config.output.print_progress

    @property
    def train_seconds(self) -> float:
        """Spent training up to the last report, evaluations left out."""
        return self._meter.seconds

    @property
    def reached_target(self) -> bool:
        """Whether a validation has come to --validation_auroc."""
        return self.position.reaches(self._config.evaluation.validation_auroc)

    def train(self, epochs: int | None = None) -> None:
        """Trains until so many epochs are done, by default --epochs, with the validations and checkpoints that are due.

        Raises:
            DivergedError: when a loss or a score is not finite.
            DatasetError: when mapped data turns out to be wrong.
            CheckpointError: when a checkpoint can't be written.
            Stopped: when a signal has ended training; what it had reached is saved.
        """
        epochs = self._config.training.epochs if epochs is None else epochs
        with self._saved_from_bad_rows():
            while self.position.epoch < epochs and not self.reached_target:
                self._train_epoch()
            self._hooks.end_training(self.position, self.snapshot)
        self._journal.write("train_stop", self.position, reached_target=self.reached_target)

    def _train_epoch(self) -> None:
        """What is left of an epoch, in segments that end where a validation is due."""
        split = self._split.resumed(self.position.row, self.position.epoch_step)
        steps = split.partition.num_steps
        if self.position.epoch_step == 0:
            self._journal.write("epoch_start", self.position, epoch=self.position.epoch)
        batches = self._hooks.watched(split.batches(self.position.epoch), "training")
        label, done = f"Epoch {self.position.epoch}", self.position.epoch_step
        with closing(Progress(label, steps, "steps", self._shows, done)) as progress:
            self._validate_if_due(steps, progress)  # if the run was resumed just before one
            for stop in self._segments(steps):
                self._train_segment(batches, stop, steps, progress)
                self._validate_if_due(steps, progress)
        self._journal.write("epoch_stop", self.position, epoch=self.position.epoch)
        if self.position.epoch_step == steps:
            self.position = self.position.after_epoch()

    def _segments(self, steps: int) -> Iterator[int]:
        """The step of the epoch at which each segment ends, up to the epoch's end or the target."""
        every = self._config.evaluation.validation_freq_within_epoch or max(1, steps)
        while self.position.epoch_step < steps and not self.reached_target:
            yield min(steps, (self.position.epoch_step // every + 1) * every)

    def _validation_is_due(self, steps: int) -> bool:
        """Whether a validation is due after the step just taken, in an epoch of `steps` steps."""
        epoch_step = self.position.epoch_step
        if epoch_step == 0 or self.position.validated_step == self.position.step:
            return False
        every = self._config.evaluation.validation_freq_within_epoch
        within = every is not None and epoch_step % every == 0
        return within or (epoch_step == steps and self._config.evaluation.evaluate_on_epoch_end)

    def _train_segment(self, batches: Iterator[Batch], stop: int, steps: int, progress: Progress) -> None:
        """Steps of the epoch up to `stop`. The pipeline is filled at its start, and runs dry at its end."""
        frequencies = self._split.frequencies
        batches = islice(batches, stop - self.position.epoch_step)
        self._model.train()
        self._pipeline.reset()
        self._meter.resume_clock()
        while self.position.epoch_step < stop:
            self._schedule.begin_step(self.position.step + 1)
            if self._config.output.print_lr and self._runtime.is_main:
                self._print_learning_rates(progress)
            output = self._pipeline.progress(batches)
            rows = output.batch.span.global_rows
            self.position = self.position.after_step(rows)
            if self._profiler is not None:
                self._profiler.advance()
            if frequencies is not None:
                frequencies.count(output.batch)
            self._meter.update(self.position.step, output.loss, rows)
            is_due = self._meter.is_full or self.position.epoch_step == stop
            progress.advance(note=self._report(self._meter.drain()) if is_due else "")
            self._hooks.after_step(self.position, self.snapshot, before_validation=self._validation_is_due(steps))

    def _report(self, report: TrainingReport) -> str:
        """Writes a report's line; gives it in words."""
        rate, dense_rate = self._schedule.learning_rate, self._schedule.dense_learning_rate
        position = self.position
        self._journal.write(
            "train",
            position,
            epoch=position.epoch,
            **asdict(report),
            learning_rate=rate,
            dense_learning_rate=dense_rate,
        )
        last = position.own_aurocs[-1] if position.own_aurocs else None
        auroc = "-" if last is None else f"{last:.6f}"
        return f"{report.samples_per_second:,.0f} samples/s | loss {report.loss:.5f} | lr {rate:g} | val AUROC {auroc}"

    def _validate_if_due(self, steps: int, progress: Progress) -> None:
        if not self._validation_is_due(steps):
            return
        paused = time.perf_counter()
        result = self.evaluate("val")
        past = self.position.own_aurocs
        is_best = result.auroc is not None and all(result.auroc > (auroc or 0.0) for auroc in past)
        self.position = self.position.after_validation(asdict(result))
        if self._runtime.is_main:
            progress.print(f"AUROC over val set: {result.describe()}")
        if self.reached_target and self._runtime.is_main:
            progress.print(
                f"Validation AUROC {result.auroc:.6f} reached the target "
                f"{self._config.evaluation.validation_auroc:g} after {self.position.num_samples:,} samples and "
                f"{self._journal.seconds:.1f} s."
            )
        self._hooks.after_validation(self.position, self.snapshot, is_best=is_best)
        progress.pause(time.perf_counter() - paused)

    def test(self) -> EvaluationResult:
        """Scores the test set.

        Raises:
            DivergedError: if a score is not finite.
            DatasetError: when mapped data turns out to be wrong.
        """
        with self._saved_from_bad_rows():
            result = self.evaluate("test")
        if self._runtime.is_main:
            print(f"AUROC over test set: {result.describe()}", flush=True)
        return result

    def evaluate(self, stage: Stage) -> EvaluationResult:
        """Scores every row of a split exactly once, over all ranks. Collective.

        Raises:
            DivergedError: if a score is not finite.
        """
        self._journal.write(f"{stage}_start", self.position)
        batches = self._hooks.watched(self._foundation.splits[stage].batches(), "evaluating")
        result = self._scorer.score(stage, batches, lambda: self._hooks.within_evaluation(self.position, self.snapshot))
        self._journal.write(stage, self.position, **asdict(result))
        return result

    def snapshot(self) -> tuple[State, Position]:
        """All of the training's state: its tensors, as views, and its position. Collective.

        Raises:
            DivergedError: if a loss that is not reported yet is not finite.
        """
        position = replace(
            self.position,
            train_seconds=self._meter.elapsed_seconds(),
            total_seconds=self._journal.seconds,
            pending=self._meter.pending(),
        )
        return self._foundation.state(), position

    @contextmanager
    def _saved_from_bad_rows(self) -> Iterator[None]:
        """Has the hooks save what training has reached, if rows turn out to be wrong."""
        try:
            yield
        except DatasetError as error:
            raise self._hooks.after_bad_rows(error, self.position, self.snapshot) from None

    def _print_learning_rates(self, progress: Progress) -> None:
        rates = {"tables": self._schedule.learning_rate, "dense": self._schedule.dense_learning_rate}
        for group, rate in rates.items():
            progress.print(f"lr: {self.position.step} {group} {rate:.6f}")
