"""Metrics of a pass over held-out samples.

Shapes: B samples of this rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits

from dlrm.errors import DivergedError
from dlrm.metrics.auroc import AurocSketch


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics over all samples of a split; None if a metric is undefined (no positive, or no negative).

    Attributes:
        auroc: area under the ROC curve.
        logloss: mean cross entropy in nats.
        ne: normalized entropy: logloss over the entropy of the share of positives (He et al., ADKDD 2014, section 3).
        calibration: mean prediction over share of positives.
    """

    auroc: float | None
    logloss: float
    ne: float | None
    calibration: float | None
    num_samples: int
    num_positives: int

    def describe(self) -> str:
        """One line."""
        return (
            f"{_show(self.auroc, 6)} | log loss {self.logloss:.5f} | NE {_show(self.ne, 5)} | "
            f"calibration {_show(self.calibration, 4)} | {self.num_samples:,} samples, "
            f"{self.num_positives / self.num_samples:.2%} positive"
        )


def _show(value: float | None, digits: int) -> str:
    return "undefined (one class only)" if value is None else f"{value:.{digits}f}"


class EvaluationMeter:
    """Sums over batches, on the device; memory does not grow with the set.

    `logit_correction` is added to every logit: what undersampled negatives call for. AUROC does not depend on it.
    """

    def __init__(self, device: torch.device, logit_correction: float = 0.0) -> None:
        self._logit_correction = logit_correction
        self._auroc = AurocSketch(device)
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def update(self, logits_B: torch.Tensor, labels_B: torch.Tensor) -> None:
        """Takes in one batch of this rank."""
        logits_B = logits_B.float()
        self._auroc.update(logits_B, labels_B)
        logits_B = logits_B + self._logit_correction
        losses_B = binary_cross_entropy_with_logits(logits_B, labels_B, reduction="none")
        self._sums[0] += losses_B.double().sum()
        self._sums[1] += logits_B.sigmoid().double().sum()
        self._sums[2] += labels_B.double().sum()
        self._sums[3] += len(labels_B)

    def compute(self, stage: str) -> EvaluationResult:
        """The result over all ranks. Collective.

        Raises:
            DivergedError: if a logit was not finite.
        """
        if dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        loss_sum, prediction_sum, positives, count = self._sums.tolist()
        if not torch.isfinite(self._sums[:2]).all():
            raise DivergedError(
                f"the model's scores on the {stage} set are not finite. Try a smaller --learning_rate, or --adagrad."
            ).raised_everywhere()
        share = positives / count
        logloss = loss_sum / count
        mixed = 0 < share < 1
        rate = torch.tensor([share, 1 - share], dtype=torch.float64)
        entropy = -(rate * rate.log()).sum().item() if mixed else None
        return EvaluationResult(
            auroc=self._auroc.compute(),
            logloss=logloss,
            ne=None if entropy is None else logloss / entropy,
            calibration=prediction_sum / positives if positives > 0 else None,
            num_samples=int(count),
            num_positives=int(positives),
        )
