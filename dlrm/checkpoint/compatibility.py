"""Whether a training can go on from a checkpoint that another config wrote. No torch here."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from dlrm.config.config import Config
from dlrm.config.field_rules import Resume, flags_of


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


def _may_differ(difference: Difference, rules: Collection[object]) -> bool:
    if Resume.TAKEN_OVER in rules:
        return difference.given is None
    return Resume.FREE in rules


def misfits(saved: Config, given: Config) -> list[Difference]:
    """Differences with which the training would not be the one that was saved."""
    flags = flags_of(given)
    found = [one for one in differences(saved, given) if not _may_differ(one, flags[one.name].rules)]
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
