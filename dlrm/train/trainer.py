"""The training loop.

Shapes: B samples of this rank.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch.profiler import record_function
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.config import Config
from dlrm.console import Progress
from dlrm.data.batch import Batch
from dlrm.data.binary_days import Stage
from dlrm.data.splits import Split
from dlrm.metrics.evaluation import EvaluationMeter, EvaluationResult
from dlrm.metrics.sinks import Sink
from dlrm.metrics.training import TrainingMeter, TrainingReport
from dlrm.runtime import Runtime
from dlrm.train.pipeline import build_pipeline
from dlrm.train.profiling import StepProfiler
from dlrm.train.schedule import LearningRateSchedule

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
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.splits = splits
        self.model = model
        self.sink = sink
        self.profiler = profiler
        self.pipeline = build_pipeline(config.training.pipeline, model, optimizer, runtime.device)
        self.schedule = LearningRateSchedule(optimizer, config.optimizer)
        self.step = 0
        self.num_samples = 0
        self.val_results: list[EvaluationResult] = []
        self.steps_per_report = config.output.log_every or max(
            1, min(MAX_STEPS_PER_REPORT, splits["train"].partition.num_steps // REPORTS_PER_EPOCH)
        )
        self.meter = TrainingMeter(self.steps_per_report, runtime.device, runtime.world_size)
        self._shows = runtime.is_main and config.output.print_progress
        self.reached_target = False
        self._started = time.perf_counter()

    def train(self) -> None:
        """All epochs, with the validations that are due within and after each.

        Raises:
            DivergedError: when a loss or a score is not finite.
            DatasetError: when mapped data turns out to be wrong.
        """
        self._started = time.perf_counter()
        for epoch in range(self.config.training.epochs):
            self._train_epoch(epoch)
            if self.reached_target:
                break
        self._write("train_stop", reached_target=self.reached_target)

    def _train_epoch(self, epoch: int) -> None:
        """The pipeline runs dry before each validation and is filled again after it."""
        self._write("epoch_start", epoch=epoch)
        split, evaluation = self.splits["train"], self.config.evaluation
        steps = split.partition.num_steps
        batches = split.batches(epoch)
        progress = Progress(f"Epoch {epoch}", steps, "steps", self._shows)
        every = evaluation.validation_freq_within_epoch or steps
        for start in range(0, steps, every):
            stop = min(start + every, steps)
            self._train_steps(islice(batches, stop - start), epoch, range(start, stop), progress)
            within = evaluation.validation_freq_within_epoch is not None and stop - start == every
            if within or (stop == steps and evaluation.evaluate_on_epoch_end):
                paused = time.perf_counter()
                self._validate(progress)
                progress.pause(time.perf_counter() - paused)
            if self.reached_target:
                break
        progress.close()
        self._write("epoch_stop", epoch=epoch)

    def _train_steps(self, batches: Iterator[Batch], epoch: int, steps: range, progress: Progress) -> None:
        partition = self.splits["train"].partition
        self.model.train()
        self.pipeline.reset()
        self.meter.resume_clock()
        for position in steps:
            self.schedule.begin_step(self.step + 1)
            if self.config.output.print_lr and self.runtime.is_main:
                self._print_learning_rates(progress)
            loss, _, _ = self.pipeline.progress(batches)
            self.step += 1
            if self.profiler is not None:
                self.profiler.advance()
            self.meter.update(self.step, loss, partition.span(position, self.runtime.rank).global_rows)
            is_due = self.meter.is_full or position == steps[-1]
            progress.advance(note=self._report(self.meter.drain(), epoch) if is_due else "")

    def _report(self, report: TrainingReport, epoch: int) -> str:
        """Writes a report to the sink; returns it in words."""
        self.num_samples = report.num_train_samples
        rate = self.schedule.learning_rate
        auroc = (
            f"{self.val_results[-1].auroc:.6f}" if self.val_results and self.val_results[-1].auroc is not None else "-"
        )
        dense_rate = self.schedule.dense_learning_rate
        self._write("train", epoch=epoch, **asdict(report), learning_rate=rate, dense_learning_rate=dense_rate)
        return f"{report.samples_per_second:,.0f} samples/s | loss {report.loss:.5f} | lr {rate:g} | val AUROC {auroc}"

    def _validate(self, progress: Progress) -> None:
        result = self.evaluate("val")
        self.val_results.append(result)
        if self.runtime.is_main:
            progress.print(f"AUROC over val set: {result.describe()}")
        target = self.config.evaluation.validation_auroc
        if target is not None and result.auroc is not None and result.auroc >= target:
            self.reached_target = True
            if self.runtime.is_main:
                progress.print(
                    f"Validation AUROC {result.auroc:.6f} reached the target {target:g} after {self.num_samples:,} "
                    f"samples and {self.seconds:.1f} s."
                )

    def test(self) -> EvaluationResult:
        """Scores the test set."""
        result = self.evaluate("test")
        if self.runtime.is_main:
            print(f"AUROC over test set: {result.describe()}", flush=True)
        return result

    @record_function("## evaluate ##")
    @torch.no_grad()
    def evaluate(self, stage: Stage) -> EvaluationResult:
        """Scores every row of a split exactly once, over all ranks. Collective.

        Raises:
            DivergedError: if a score is not finite.
        """
        self._write(f"{stage}_start")
        split = self.splits[stage]
        self.model.eval()
        self.pipeline.reset()
        meter = EvaluationMeter(self.runtime.device, self.config.data.logit_correction)
        progress = Progress(f"Evaluating {stage} set", split.partition.num_used_rows, "samples", self._shows)
        batches = split.batches()
        for span in split.partition.spans(self.runtime.rank):
            _, logits_B, labels_B = self.pipeline.progress(batches)
            meter.update(logits_B, labels_B)
            progress.advance(span.global_rows)
        progress.close()
        result = meter.compute(stage)
        self._write(stage, **asdict(result))
        return result

    @property
    def seconds(self) -> float:
        """Since training began, validations included."""
        return time.perf_counter() - self._started

    def _write(self, kind: str, **fields: Any) -> None:
        where = {"kind": kind, "step": self.step, "num_train_samples": self.num_samples}
        self.sink.append_metrics({**where, **fields, "elapsed_seconds": round(self.seconds, 3)})

    def _print_learning_rates(self, progress: Progress) -> None:
        rates = {"tables": self.schedule.learning_rate, "dense": self.schedule.dense_learning_rate}
        for group, rate in rates.items():
            progress.print(f"lr: {self.step} {group} {rate:.6f}")
