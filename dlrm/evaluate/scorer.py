"""A pass over held-out samples.

Shapes: B samples of this rank.
"""

from collections.abc import Callable, Iterator

import torch
from torch.profiler import record_function

from dlrm.assembly.foundation import Foundation
from dlrm.dataset.binary_days import Stage
from dlrm.loader.batch import Batch
from dlrm.metrics.evaluation import EvaluationMeter, EvaluationResult
from dlrm.model.dlrm import Output
from dlrm.system.console import Progress


class Scorer:
    """Scores splits with a sharded model. Every rank has one, and calls it in the same order."""

    def __init__(self, foundation: Foundation) -> None:
        self._model, self._pipeline = foundation.model, foundation.pipeline
        self._splits, self._runtime = foundation.splits, foundation.runtime
        config = foundation.config
        self._logit_correction = config.data.logit_correction
        self._shown = config.output.print_progress and foundation.runtime.is_main

    @record_function("## evaluate ##")
    @torch.no_grad()
    def score(self, stage: Stage, batches: Iterator[Batch], after_batch: Callable[[], None]) -> EvaluationResult:
        """Scores every row of a split exactly once, over all ranks. Collective.

        Args:
            batches: this rank's of that split.

        Raises:
            DivergedError: if a score is not finite.
        """
        self._model.eval()
        self._pipeline.reset()
        meter = EvaluationMeter(self._runtime.device, self._logit_correction)
        rows = self._splits[stage].partition.num_used_rows
        progress = Progress(f"Evaluating {stage} set", rows, "samples", self._shown)
        while (output := self._next(batches)) is not None:
            meter.update(output.logits_B, output.labels_B)
            progress.advance(output.batch.span.global_rows)
            after_batch()
        progress.close()
        return meter.compute(stage)

    def _next(self, batches: Iterator[Batch]) -> Output | None:
        try:
            return self._pipeline.progress(batches)
        except StopIteration:
            return None
