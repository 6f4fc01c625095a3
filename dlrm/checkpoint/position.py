"""Where a training stands, as a checkpoint keeps it. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dlrm.errors import CheckpointError


@dataclass(frozen=True)
class Position:
    """All of a training's state but its tensors.

    Attributes:
        step: training steps taken.
        epoch: the epoch that the next batch belongs to.
        epoch_step: steps taken in it.
        row: the row of the epoch's order that the next batch starts with.
        num_samples: trained on, over all ranks.
        validated_step: the step after which the last validation was.
        train_seconds: spent training; `total_seconds` adds validations.
        pending: steps not reported yet: step, samples, mean loss over all ranks.
        validations: metrics of each validation.
        foreign_validations: how many of them, the first ones, were on data that was changed since. They count neither
            for the best one nor for the target.
        samples_before: of `num_samples`, those that other runs had trained on, whose checkpoint this run was resumed
            from.
        optimizer_steps: those that the optimizers' state had seen when training began: --init_optimizer.
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
        """AUROC of a validation after this very step, if there was one and it is defined."""
        is_validated = self.validations and self.validated_step == self.step
        return self.validations[-1]["auroc"] if is_validated else None

    def reaches(self, auroc: float | None) -> bool:
        """Whether a validation on this data has come to that AUROC; False for None."""
        return auroc is not None and any((own or 0.0) >= auroc for own in self.own_aurocs)

    def after_step(self, rows: int) -> "Position":
        """The same after a step on so many rows, over all ranks."""
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
        """The same with one validation more."""
        return replace(self, validated_step=self.step, validations=(*self.validations, metrics))

    def on_new_data(self) -> "Position":
        """The start of the first epoch on other data, in the same training."""
        return replace(self, epoch=0, epoch_step=0, row=0, foreign_validations=len(self.validations))

    def in_new_run(self) -> "Position":
        """The same in another run that continues this training."""
        return replace(self, samples_before=self.num_samples)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Position":
        """What `to_json` gave.

        Raises:
            CheckpointError: if it has other fields.
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
