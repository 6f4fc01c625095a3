"""A command line becomes a config: a recipe or an old run's config first, flags on top. A mistake is one line."""

import dataclasses
import difflib
import itertools
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
from tyro import _errors as tyro_errors  # tyro has no public name for these; its version is pinned

from dlrm.config.checks import check_config, flags_without_effect
from dlrm.config.config import Config
from dlrm.config.field_rules import AliasOf, Repeat, flags_of
from dlrm.config.recipes import RECIPES
from dlrm.errors import ConfigError

T = TypeVar("T")

_OF_A_VALUE = (tyro_errors.InvalidChoice, tyro_errors.InstantiationFailure)
_DASHES = "-\N{EN DASH}\N{EM DASH}"
_FLAG = re.compile(rf"[{_DASHES}]+[A-Za-z]")

PROG = "dlrm_main.py"
DESCRIPTION = """Trains, validates and tests a Deep Learning Recommendation Model with TorchRec.

Takes the flags of the public TorchRec DLRM example, spelled as there. Without a data path the data is random.
Start it with python (one process), torchrun or torchx (one process per device)."""


def parse_args(argv: Sequence[str]) -> Config:
    """The run that a command line asks for, checked.

    Raises:
        ConfigError: on an unknown flag, a value of the wrong kind, or a combination that makes no sense.
        SystemExit: after --help, with code 0.
    """
    return settle(parse_flags(Config, argv, PROG, description=DESCRIPTION, default=base_of(argv)), argv)


def settle(config: Config, argv: Sequence[str], *, needs_data: bool = True) -> Config:
    """The config of a command line, checked.

    A flag on top of a recipe can leave others of the recipe without effect: these get their defaults. Flags without
    effect that the command line names are refused.

    Args:
        needs_data: whether the command reads data. Then a recipe's data flags are refused too if no data is given.

    Raises:
        ConfigError: on a combination that makes no sense.
    """
    for flag, _ in flags_without_effect(config):
        if not (flag.section == "data" and needs_data) and not is_named(argv, flag.name):
            config = flag.reset(config)
    check_config(config)
    return config


def parse_flags(
    kind: type[T], argv: Sequence[str], prog: str, description: str | None = None, default: T | None = None
) -> T:
    """An instance of the dataclass `kind`, whose fields are the flags.

    Args:
        argv: the command line without the program's name.
        prog: how the program is called, for --help and messages.
        description: the first lines of --help; None for the docstring of `kind`.
        default: values of flags that are not given; None for the defaults of the fields.

    Raises:
        ConfigError: on an unknown flag or a value of the wrong kind.
        SystemExit: after --help, with code 0.
    """

    def refuse(event: tyro_errors.ParseErrorEvent) -> NoReturn:
        foreign = _find_foreign(kind, argv)
        is_theirs = foreign is not None and not isinstance(event, _OF_A_VALUE)
        text = _describe_foreign(event, foreign, kind, prog) if is_theirs else _describe(event, argv)
        raise ConfigError(f"{text}. `{prog} --help` lists the flags.")

    with tyro_errors.on_parse_error(refuse):
        return tyro.cli(
            kind,
            args=list(argv),
            default=default,
            prog=prog,
            description=description,
            config=(tyro.conf.OmitArgPrefixes,),
            use_underscores=True,
        )


def is_named(argv: Sequence[str], flag: str) -> bool:
    """Whether a command line has this flag."""
    spelled = (f"--{flag}", f"--{flag.replace('_', '-')}")
    return any(token.split("=", 1)[0] in spelled for token in argv)


def base_of(argv: Sequence[str]) -> Config:
    """The config that the other flags of a command line change: an old run's, a recipe's, or the defaults.

    Raises:
        ConfigError: if the recipe or config does not exist.
    """
    base = without_replaced_aliases(_named_base(argv), argv)
    if is_named(argv, "num_embeddings") and not is_named(argv, "num_embeddings_per_feature"):
        base = flags_of(base)["num_embeddings_per_feature"].reset(base)
    return base


def without_replaced_aliases(config: Config, argv: Sequence[str]) -> Config:
    """The config with the default of each flag that a command line replaces by giving its alias, or by giving the flag
    that it is an alias of."""
    flags = flags_of(config)
    for flag in flags.values():
        for rule in flag.rules:
            if isinstance(rule, AliasOf):
                for given, other in ((flag.name, rule.flag), (rule.flag, flag.name)):
                    if is_named(argv, given) and not is_named(argv, other):
                        config = flags[other].reset(config)
    return config


def _named_base(argv: Sequence[str]) -> Config:
    name, path = value_of(argv, "recipe"), value_of(argv, "config")
    if path is not None:
        if name is not None:
            raise ConfigError("--config with --recipe: give one of the two")
        return dataclasses.replace(load_config(path), config=path)
    if name is None:
        return Config()
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name or '(nothing)'}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def load_config(path: str) -> Config:
    """The config in a run's config.json, to be run again: flags that belong to the old run have their defaults.

    Raises:
        ConfigError: if the file can't be read, or is no config.json.
    """
    try:
        config = Config.load(Path(path))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}. Expected the config.json of a run.") from None
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}. Expected the config.json of a run.") from None
    except ValueError:
        raise ConfigError(f"--config {path}: is no JSON. Expected the config.json of a run.") from None
    for flag in flags_of(config).values():
        if Repeat.LEFT_OUT in flag.rules:
            config = flag.reset(config)
    return config


def value_of(argv: Sequence[str], flag: str) -> str | None:
    """The value of a flag, before all flags are parsed; None if it is not given, empty if its value is missing.

    If a flag is given twice, the last value counts, as with tyro.
    """
    value = None
    for position, token in enumerate(argv):
        if token == f"--{flag}":
            value = argv[position + 1] if position + 1 < len(argv) else ""
        elif token.startswith(f"--{flag}="):
            value = token.removeprefix(f"--{flag}=")
    return value


def _find_foreign(kind: type, argv: Sequence[str]) -> str | None:
    """The first flag of a command line that the dataclass does not have. tyro may blame another flag instead."""
    known = {"--h", "--help", *_flags(kind)}
    for token in itertools.takewhile(lambda token: token != "--", argv):
        name = token.split("=", 1)[0]
        plain = _plain(name)
        is_known = name.startswith("-") and {f"--{plain}", f"--{plain.removeprefix('no_')}"} & known
        if _FLAG.match(name) and not is_known:
            return name
    return None


def _plain(name: str) -> str:
    return name.lstrip(_DASHES).replace("-", "_")


def _describe_foreign(event: tyro_errors.ParseErrorEvent, name: str, kind: type, prog: str) -> str:
    """One line about a flag that does not exist. `kind.FOREIGN_NAMES` says how others name flags."""
    plain, known = _plain(name), _flags(kind)
    meant = getattr(kind, "FOREIGN_NAMES", {}).get(plain, plain)
    if meant in _positionals(kind):
        return f"{name}: not a flag; {meant.upper()} is given without one, as in `{prog} {meant.upper()}`"
    tokens = event.tokens if isinstance(event, tyro_errors.UnrecognizedArgs) else []
    shown = " ".join(tokens) if tokens[:1] and tokens[0].startswith(name) else name
    near = difflib.get_close_matches(f"--{meant}", known, n=1) if len(plain) > 1 else []
    return f"{shown}: not a flag" + (f"; did you mean {near[0]}" if near else "")


def _describe(event: tyro_errors.ParseErrorEvent, argv: Sequence[str]) -> str:
    """One line in place of the box that tyro would print."""
    match event:
        case tyro_errors.UnrecognizedArgs(tokens=tokens):
            given = [part for token in argv for part in token.split("=", 1)]
            switch = given[given.index(tokens[0]) - 1] if tokens[0] in given[1:] else ""
            return f"{' '.join(tokens)}: not a flag" + (f", and {switch} takes no value" if _FLAG.match(switch) else "")
        case tyro_errors.InvalidChoice(argument=argument, value=value, choices=choices):
            # If a flag may be left out, tyro gives its choices as a set, None among them.
            allowed = sorted(set(choices) - {"None"}) if "None" in choices else choices
            return f"{_name(argument)} {value}: expected one of {', '.join(allowed)}"
        case tyro_errors.BadValue(argument=argument):
            return f"{_name(argument)}: expected a value"
        case tyro_errors.InstantiationFailure(argument=argument, message=message) if argument is not None:
            # If a type has alternatives, tyro lists why each of them failed; the user meant the last one.
            cause = " ".join(message.split()).rsplit("'>: ", 1)[-1].rsplit(")]: ", 1)[-1]
            return f"{_name(argument)}: expected {argument.lowered.metavar} ({cause})"
        case tyro_errors.MissingArgs(missing_arguments=missing):
            return f"missing: {', '.join(_name(context.arg) for context in missing)}"
    return type(event).__name__


def _name(argument: Any) -> str:
    """An argument as the user writes it: its flag, or without one its name in `--help`."""
    return argument.field.intern_name if argument.is_positional() else f"--{argument.field.intern_name}"


def _positionals(kind: type) -> list[str]:
    """Fields of a dataclass that are given without a flag."""
    hints = typing.get_type_hints(kind, include_extras=True)
    marker = tyro.conf.Positional[str].__metadata__[0]  # type: ignore[missing-attribute] # it is an Annotated
    return [name for name, hint in hints.items() if marker in getattr(hint, "__metadata__", ())]


def _flags(kind: type) -> list[str]:
    """Flags of a dataclass, and of the dataclasses that are its fields."""
    flags, positional = [], _positionals(kind)
    for field in dataclasses.fields(kind):
        section = field.default_factory
        if isinstance(section, type):
            flags += _flags(section)
        elif field.name not in positional:
            flags.append(f"--{field.name}")
    return flags
