"""Rules that a flag has in its field's type, beside its bounds, so that a flag is declared in one place.

    test_batch_size: Annotated[int | None, Gt(0), Resume.FREE, Scoring.COUNTS] = None

Every flag of a run has one rule of `Resume` and one of `Scoring`; a test asks for them. No torch here.
"""

import dataclasses
import functools
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


class Resume(Enum):
    """Whether a training may be resumed with another value than its checkpoint's."""

    FREE = "it may: the flag does not touch the model that comes out of a step"
    FIXED = "it may not"
    TAKEN_OVER = "the checkpoint's value is taken if the flag is not given; another one is refused"


class Scoring(Enum):
    """What a flag does when `dlrm evaluate` scores a checkpoint."""

    COUNTS = "it is as in the checkpoint's config.json, unless it is given"
    IDLE = "it changes nothing, so it has its default and is refused if it is given"
    FIXED = "the checkpoint's weights were trained with it, so another value is refused"


class Repeat(Enum):
    """What happens to a flag of config.json when `--config` starts the run again. Without this rule it is kept."""

    LEFT_OUT = "it belongs to that one run"


@dataclass(frozen=True)
class AliasOf:
    """A switch that is short for --`flag` `value`. The one that is on the command line replaces the other."""

    flag: str
    value: str


@dataclass(frozen=True)
class NoEffect:
    """A case in which a flag would change nothing. It is refused then.

    Attributes:
        is_idle: whether a run with this Config is such a case.
        why: the reason, as the message has it behind the flag and its value.
    """

    is_idle: Callable[[Any], bool]
    why: str


def needs(other: str, value: str | None = None) -> NoEffect:
    """The case that the flag `other`, without which a flag would change nothing, is not given, or not `value`."""

    def is_missing(config: Any) -> bool:
        found = flags_of(config)[other].value(config)
        return found != value if value is not None else not found

    return NoEffect(is_missing, f"needs --{other}" if value is None else f"needs --{other} {value}")


@dataclass(frozen=True)
class Flag:
    """A field of Config or of one of its sections.

    Attributes:
        section: the section's field in Config; empty for a field of Config itself.
        rules: all annotations of the field's type, bounds among them.
    """

    section: str
    name: str
    default: Any
    rules: tuple[object, ...]

    def value(self, config: Any) -> Any:
        """What a Config has in this field."""
        return getattr(getattr(config, self.section) if self.section else config, self.name)

    def reset(self, config: ConfigT) -> ConfigT:
        """The Config with the flag's default."""
        if not self.section:
            return dataclasses.replace(config, **{self.name: self.default})  # type: ignore[bad-argument-type]
        section = dataclasses.replace(getattr(config, self.section), **{self.name: self.default})
        return dataclasses.replace(config, **{self.section: section})  # type: ignore[bad-argument-type]


def flags_of(config: Any) -> dict[str, Flag]:
    """All flags of a Config by name; a name belongs to one section."""
    found: dict[str, Flag] = {}
    for field in dataclasses.fields(config):
        owner = getattr(config, field.name)
        if dataclasses.is_dataclass(owner):
            found |= _flags(type(owner), field.name)
        else:
            found[field.name] = Flag("", field.name, field.default, rules_of(type(config))[field.name])
    return found


@functools.cache
def _flags(section: type, name: str) -> dict[str, Flag]:
    rules = rules_of(section)
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(section)  # type: ignore[bad-argument-type]
    return {field.name: Flag(name, field.name, field.default, rules[field.name]) for field in fields}


@functools.cache
def rules_of(section: type) -> dict[str, tuple[object, ...]]:
    """The annotations of each field's type, by field."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
