"""Where a training stands, as a checkpoint keeps it. No torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
        seconds = (position.train_seconds, position.total_seconds)
        if not all(type(count) is int and 0 <= count < 2**63 for count in (*counts, position.validated_step)):
            raise CheckpointError("its position has a count that is no whole number from 0 to 2^63")
        if not all(type(value) in (int, float) and value >= 0 for value in seconds):
            raise CheckpointError("its position has a time that is no number from 0 on")
        metrics = [value for validation in position.validations for value in validation.values()]
        if not all(type(value) in (int, float, type(None)) for value in metrics):
            raise CheckpointError("its position has a validation that is no numbers")
        return position
