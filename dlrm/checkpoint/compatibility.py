"""Whether a training can continue from a checkpoint that another config wrote. No torch here."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from dlrm.config.config import Config
from dlrm.config.field_rules import Resume, flags_of


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field in which two configs have different values; `section` is empty for a field of Config itself."""

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
    """All fields in which two configs differ, in the order of Config."""
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
    """Differences that would make the training another one than the saved one."""
    flags = flags_of(given)
    found = [one for one in differences(saved, given) if not _may_differ(one, flags[one.name].rules)]
    if saved.frozen == given.frozen != ():  # the same tables, say as `--freeze all` and by their names
        found = [difference for difference in found if difference.name != "freeze"]
    elif (
        saved.frozen != given.frozen and saved.optimizer.freeze == given.optimizer.freeze
    ):  # `large` means other tables now
        sizes = saved.sharding.large_table_gib, given.sharding.large_table_gib
        found.append(Difference("sharding", "large_table_gib", *sizes))
    if saved.optimizer.algorithm == given.optimizer.algorithm:  # as with --adagrad and --optimizer adagrad
        found = [difference for difference in found if difference.name not in ("optimizer", "adagrad")]
    return found


def model_misfits(saved: Config, given: Config) -> list[Difference]:
    """Differences that would make the saved weights another model's."""
    return [difference for difference in misfits(saved, given) if difference.section == "model"]
