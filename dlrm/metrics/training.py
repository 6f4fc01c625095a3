"""Loss and rate while training, kept on the device until asked for."""

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dlrm.errors import DivergedError


@dataclass(frozen=True)
class TrainingReport:
    """Since the last report: mean loss per sample and samples per second, over all ranks.

    `num_train_samples` counts from the start of the run.
    """

    step: int
    num_train_samples: int
    loss: float
    samples_per_second: float


class TrainingMeter:
    """Collects each step's loss without waiting for the device."""

    def __init__(self, capacity: int, device: torch.device, world_size: int) -> None:
        self._losses = torch.zeros(capacity, device=device)
        self._world_size = world_size
        self._steps: list[tuple[int, int]] = []
        self._num_samples = 0
        self._started = time.perf_counter()
        self.seconds = 0.0
        """Time spent training, evaluations left out."""

    def resume_clock(self) -> None:
        """Call when training goes on after something else."""
        self._started = time.perf_counter()

    def update(self, step: int, loss: torch.Tensor, global_rows: int) -> None:
        """Takes in this rank's loss of a step; the mean over ranks is the mean over the step's samples."""
        self._losses[len(self._steps)] = loss
        self._steps.append((step, global_rows))

    @property
    def is_full(self) -> bool:
        """Whether `drain` must be called before the next update."""
        return len(self._steps) == len(self._losses)

    def drain(self) -> TrainingReport:
        """Reports one step or more, and starts over. Collective.

        Raises:
            DivergedError: at the first step whose loss is not finite.
        """
        losses = self._losses[: len(self._steps)].clone()
        if self._world_size > 1:
            dist.all_reduce(losses)
        means = (losses / self._world_size).tolist()
        seconds = time.perf_counter() - self._started
        self._started = time.perf_counter()
        self.seconds += seconds
        for (step, _), loss in zip(self._steps, means, strict=True):
            if not math.isfinite(loss):
                error = DivergedError(
                    f"loss {loss} at step {step}. Try a smaller --learning_rate, or --adagrad, and look for extreme "
                    "dense values in the data."
                )
                error.everywhere = True
                raise error
        rows = [rows for _, rows in self._steps]
        self._num_samples += sum(rows)
        loss = sum(loss * n for loss, n in zip(means, rows, strict=True)) / sum(rows)
        report = TrainingReport(self._steps[-1][0], self._num_samples, loss, sum(rows) / seconds)
        self._steps.clear()
        return report
