"""Whether a training can go on from a checkpoint that another config wrote. No torch here."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dlrm.config.config import Config

# What may change between saving and resuming; all else must not. Where tables lie, how many ranks share a batch, what
# is reported and when it is validated do not touch the model that comes out of a step.
_FREE: dict[str, tuple[str, ...] | None] = {
    "data": (
        "in_memory_binary_criteo_path",
        "synthetic_multi_hot_criteo_path",
        "mmap_mode",
        "batch_size",
        "test_batch_size",
        "limit_val_batches",
        "limit_test_batches",
        "pin_memory",
    ),
    "sharding": None,
    "training": ("epochs", "seed", "pipeline", "precision", "allow_tf32", "dense_execution"),
    "evaluation": None,
    "checkpoint": None,
    "output": None,
    "config": None,
    "recipe": None,
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field that two configs have different values in."""

    section: str
    name: str
    saved: Any
    given: Any

    def __str__(self) -> str:
        """`--embedding_dim 128 (here 64)`."""
        return f"--{self.name} {_show(self.saved)} (here {_show(self.given)})"


def _show(value: Any) -> str:
    if value is None:
        return "not given"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def differences(saved: Config, given: Config) -> Iterator[Difference]:
    """All fields in which two configs differ."""
    for section in dataclasses.fields(Config):
        one, other = getattr(saved, section.name), getattr(given, section.name)
        if not dataclasses.is_dataclass(one):
            if one != other:
                yield Difference("", section.name, one, other)
            continue
        for field in dataclasses.fields(one):  # type: ignore[arg-type]
            if getattr(one, field.name) != getattr(other, field.name):
                yield Difference(section.name, field.name, getattr(one, field.name), getattr(other, field.name))


def misfits(saved: Config, given: Config) -> list[Difference]:
    """Differences with which the training would not be the one that was saved."""
    found = []
    for difference in differences(saved, given):
        free = _FREE.get(difference.section or difference.name, ())
        if free is not None and difference.name not in free:
            found.append(difference)
    if given.training.seed not in (None, saved.training.seed):
        found.append(Difference("training", "seed", saved.training.seed, given.training.seed))
    if saved.frozen == given.frozen != ():  # --freeze all or the name of each
        found = [difference for difference in found if difference.name != "freeze"]
    elif saved.frozen != given.frozen and saved.optimizer.freeze == given.optimizer.freeze:  # what is large has changed
        sizes = saved.sharding.large_table_gib, given.sharding.large_table_gib
        found.append(Difference("sharding", "large_table_gib", *sizes))
    if saved.optimizer.algorithm == given.optimizer.algorithm:  # --adagrad or --optimizer adagrad
        found = [difference for difference in found if difference.name not in ("optimizer", "adagrad")]
    return found


def model_misfits(saved: Config, given: Config) -> list[Difference]:
    """Differences with which the saved weights would not be this model's."""
    return [difference for difference in misfits(saved, given) if difference.section == "model"]
