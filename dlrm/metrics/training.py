"""Loss and rate while training, kept on the device until asked for."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dlrm.errors import DivergedError


@dataclass(frozen=True)
class TrainingReport:
    """Since the last report: mean loss per sample and samples per second, over all ranks."""

    step: int
    loss: float
    samples_per_second: float


class TrainingMeter:
    """Collects each step's loss without waiting for the device."""

    def __init__(
        self,
        capacity: int,
        device: torch.device,
        world_size: int,
        seconds: float = 0.0,
        pending: Sequence[tuple[int, int, float]] = (),
    ) -> None:
        """Begins, or continues where another meter was.

        Args:
            capacity: most steps between two reports.
            seconds: what the other one had spent training.
            pending: its steps that were not reported.
        """
        self._losses = torch.zeros(capacity, device=device)
        self._world_size = world_size
        self._steps: list[tuple[int, int]] = []
        self._restored = list(pending)
        self._started = time.perf_counter()
        self.seconds = seconds
        """Time spent training up to the last report, evaluations left out."""

    def resume_clock(self) -> None:
        """Call when training continues after something else."""
        self._started = time.perf_counter()

    def update(self, step: int, loss: torch.Tensor, global_rows: int) -> None:
        """Takes in this rank's loss of a step; the mean over ranks is the mean over the step's samples."""
        self._losses[len(self._steps)] = loss
        self._steps.append((step, global_rows))

    @property
    def is_full(self) -> bool:
        """Whether `drain` must be called before the next update."""
        return len(self._restored) + len(self._steps) >= len(self._losses)

    def elapsed_seconds(self) -> float:
        """Time spent training up to now; call while training."""
        return self.seconds + (time.perf_counter() - self._started if self._steps else 0.0)

    def pending(self) -> tuple[tuple[int, int, float], ...]:
        """Steps since the last report: step, samples, mean loss over all ranks. Collective.

        Raises:
            DivergedError: at the first step whose loss is not finite.
        """
        losses = self._losses[: len(self._steps)].clone()
        if self._world_size > 1:
            dist.all_reduce(losses)
        means = (losses / self._world_size).tolist()
        for (step, _), loss in zip(self._steps, means, strict=True):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"loss {loss} at step {step}. Try a smaller --learning_rate, or --adagrad, and look for extreme "
                    "dense values in the data."
                ).raised_everywhere()
        new = ((step, rows, loss) for (step, rows), loss in zip(self._steps, means, strict=True))
        return (*self._restored, *new)

    def drain(self) -> TrainingReport:
        """Reports one step or more, and starts over. Collective.

        Raises:
            DivergedError: at the first step whose loss is not finite.
        """
        steps = self.pending()
        seconds = time.perf_counter() - self._started
        self._started = time.perf_counter()
        self.seconds += seconds
        rows = sum(rows for _, rows, _ in steps)
        loss = sum(loss * rows for _, rows, loss in steps) / rows
        rate = sum(rows for _, rows in self._steps) / seconds
        report = TrainingReport(steps[-1][0], loss, rate)
        self._steps.clear()
        self._restored.clear()
        return report
