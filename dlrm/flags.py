"""A command line becomes a config: recipe first, flags on top, every mistake one line."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import NoReturn

import tyro
from tyro import _errors as tyro_errors

from dlrm.config import Config
from dlrm.errors import ConfigError
from dlrm.recipes import RECIPES

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
    base = _recipe_of(argv)
    if _names(argv, "num_embeddings") and not _names(argv, "num_embeddings_per_feature"):
        base = dataclasses.replace(base, model=dataclasses.replace(base.model, num_embeddings_per_feature=None))
    if (
        _names(argv, "in_memory_binary_criteo_path")
        and not _names(argv, "multi_hot_sizes")
        and base.data.multi_hot_sizes
    ):
        raise ConfigError(
            f"--recipe {base.recipe} with --in_memory_binary_criteo_path: binary days of several ids per feature are "
            "not read yet. Leave the path out to run it on random data."
        )
    with tyro_errors.on_parse_error(_refuse):
        config = tyro.cli(
            Config,
            args=list(argv),
            default=base,
            prog=PROG,
            description=DESCRIPTION,
            config=(tyro.conf.OmitArgPrefixes,),
            use_underscores=True,
        )
    config.validate()
    return config


def _names(argv: Sequence[str], flag: str) -> bool:
    spelled = (f"--{flag}", f"--{flag.replace('_', '-')}")
    return any(token.split("=", 1)[0] in spelled for token in argv)


def _recipe_of(argv: Sequence[str]) -> Config:
    name = None
    for position, token in enumerate(argv):
        if token == "--recipe":
            name = argv[position + 1] if position + 1 < len(argv) else ""
        elif token.startswith("--recipe="):
            name = token.removeprefix("--recipe=")
    if name is None:
        return Config()
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name or '(nothing)'}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]()


def _refuse(event: tyro_errors.ParseErrorEvent) -> NoReturn:
    raise ConfigError(f"{_describe(event)}. --help lists the flags.")


def _describe(event: tyro_errors.ParseErrorEvent) -> str:
    """One line for what tyro would print as a box."""
    match event:
        case tyro_errors.UnrecognizedArgs(tokens=tokens):
            near = difflib.get_close_matches(tokens[0].split("=", 1)[0], _flags(), n=1)
            return f"{' '.join(tokens)}: not a flag of {PROG}" + (f"; did you mean {near[0]}?" if near else "")
        case tyro_errors.InvalidChoice(argument=argument, value=value, choices=choices):
            return f"--{argument.field.intern_name} {value}: expected one of {', '.join(choices)}"
        case tyro_errors.BadValue(argument=argument):
            return f"--{argument.field.intern_name}: expected a value"
        case tyro_errors.InstantiationFailure(argument=argument, message=message) if argument is not None:
            return f"--{argument.field.intern_name}: {message}"
    return type(event).__name__


def _flags() -> list[str]:
    config = Config()
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    sections = [value for value in values if dataclasses.is_dataclass(value)]
    return [f"--{field.name}" for owner in (*sections, config) for field in dataclasses.fields(owner)]
