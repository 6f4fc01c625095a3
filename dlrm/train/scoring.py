"""A pass over held-out samples.

Shapes: B samples of this rank.
"""

from collections.abc import Callable, Iterator

import torch
from torch.profiler import record_function
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipeline

from dlrm.console import Progress
from dlrm.data.batch import Batch
from dlrm.data.binary_days import Stage
from dlrm.data.partition import Partition
from dlrm.metrics.evaluation import EvaluationMeter, EvaluationResult
from dlrm.runtime import Runtime
from dlrm.train.pipeline import Output


class Scorer:
    """Scores splits with a sharded model. Every rank has one, and calls it in the same order."""

    def __init__(
        self,
        model: DistributedModelParallel,
        pipeline: TrainPipeline[Batch, Output],
        runtime: Runtime,
        logit_correction: float,
        shown: bool,
    ) -> None:
        self._model, self._pipeline, self._runtime = model, pipeline, runtime
        self._logit_correction = logit_correction
        self._shown = shown and runtime.is_main

    @record_function("## evaluate ##")
    @torch.no_grad()
    def score(
        self, stage: Stage, partition: Partition, batches: Iterator[Batch], after_batch: Callable[[], None]
    ) -> EvaluationResult:
        """Scores every row of a split exactly once, over all ranks. Collective.

        Args:
            batches: this rank's.

        Raises:
            DivergedError: if a score is not finite.
        """
        self._model.eval()
        self._pipeline.reset()
        meter = EvaluationMeter(self._runtime.device, self._logit_correction)
        progress = Progress(f"Evaluating {stage} set", partition.num_used_rows, "samples", self._shown)
        for span in partition.spans(self._runtime.rank):
            _, logits_B, labels_B = self._pipeline.progress(batches)
            meter.update(logits_B, labels_B)
            progress.advance(span.global_rows)
            after_batch()
        progress.close()
        return meter.compute(stage)
