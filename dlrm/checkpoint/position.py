"""How far a training has come, as a checkpoint keeps it. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dlrm.errors import CheckpointError


@dataclass(frozen=True)
class Position:
    """All of a training's state except its tensors.

    Attributes:
        step: training steps taken.
        epoch: the epoch that the next batch belongs to.
        epoch_step: steps taken in that epoch.
        row: rows of the epoch consumed so far; the next batch starts with this row of the epoch's order.
        num_samples: samples trained on, over all ranks.
        validated_step: the step after which the last validation ran.
        train_seconds: seconds spent training; `total_seconds` adds validations.
        pending: steps that are not reported yet: step, samples, mean loss over all ranks.
        validations: metrics of each validation.
        foreign_validations: how many of them, the first ones, ran on other data. They count neither for the best one
            nor for the target.
        samples_before: those of `num_samples` that the run was resumed with, from a checkpoint of another run.
        optimizer_steps: steps that the optimizers' state had seen when training began, from --init_optimizer.
    """

    step: int = 0
    epoch: int = 0
    epoch_step: int = 0
    row: int = 0
    num_samples: int = 0
    validated_step: int = 0
    train_seconds: float = 0.0
    total_seconds: float = 0.0
    pending: tuple[tuple[int, int, float], ...] = ()
    validations: tuple[Mapping[str, Any], ...] = field(default=())
    foreign_validations: int = 0
    samples_before: int = 0
    optimizer_steps: int = 0

    @property
    def own_aurocs(self) -> list[float | None]:
        """AUROC of each validation on this data; None where it is undefined."""
        return [validation["auroc"] for validation in self.validations[self.foreign_validations :]]

    @property
    def step_auroc(self) -> float | None:
        """AUROC of the validation after this step; None if there was none or it is undefined."""
        is_validated = self.validations and self.validated_step == self.step
        return self.validations[-1]["auroc"] if is_validated else None

    def reaches(self, auroc: float | None) -> bool:
        """Whether a validation on this data has reached that AUROC; False for None."""
        return auroc is not None and any((own or 0.0) >= auroc for own in self.own_aurocs)

    def after_step(self, rows: int) -> "Position":
        """The position after one more step, on `rows` samples over all ranks."""
        return replace(
            self,
            step=self.step + 1,
            epoch_step=self.epoch_step + 1,
            row=self.row + rows,
            num_samples=self.num_samples + rows,
        )

    def after_epoch(self) -> "Position":
        """The start of the next epoch."""
        return replace(self, epoch=self.epoch + 1, epoch_step=0, row=0)

    def after_validation(self, metrics: Mapping[str, Any]) -> "Position":
        """The position after one more validation."""
        return replace(self, validated_step=self.step, validations=(*self.validations, metrics))

    def on_new_data(self) -> "Position":
        """The start of the first epoch on other data, in the same training."""
        return replace(self, epoch=0, epoch_step=0, row=0, foreign_validations=len(self.validations))

    def in_new_run(self) -> "Position":
        """The same position in another run that continues this training."""
        return replace(self, samples_before=self.num_samples)

    def to_json(self) -> dict[str, Any]:
        """The fields, as the manifest keeps them."""
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Position":
        """The position that `to_json` returned.

        Raises:
            CheckpointError: if a field is missing, unknown, or of another type.
        """
        try:
            pending = tuple((int(step), int(rows), float(loss)) for step, rows, loss in content["pending"])
            validations = tuple(dict(validation) for validation in content["validations"])
            fields: dict[str, Any] = {**content, "pending": pending, "validations": validations}
            position = Position(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"its position does not fit this dlrm ({error})") from None
        counts = (position.step, position.epoch, position.epoch_step, position.row, position.num_samples)
        counts += (position.foreign_validations, position.samples_before, position.optimizer_steps)
        seconds = (position.train_seconds, position.total_seconds)
        if not all(type(count) is int and 0 <= count < 2**63 for count in (*counts, position.validated_step)):
            raise CheckpointError("its position has a count that is no whole number from 0 to 2^63")
        if not all(type(value) in (int, float) and value >= 0 for value in seconds):
            raise CheckpointError("its position has a time that is no number from 0 on")
        metrics = [value for validation in position.validations for value in validation.values()]
        if not all(type(value) in (int, float, type(None)) for value in metrics):
            raise CheckpointError("its position has a validation that is no numbers")
        return position
