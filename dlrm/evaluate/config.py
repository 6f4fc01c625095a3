"""Flags of `dlrm evaluate`: its own, and those of the checkpoint's run that count in scoring. No torch here."""

import dataclasses
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from dlrm.checkpoint.compatibility import differences
from dlrm.checkpoint.find import locate, read_newest
from dlrm.config.checks import check_config, check_output_file, check_ranges, flags_without_effect
from dlrm.config.config import Config, optional
from dlrm.config.field_rules import Flag, Repeat, Scoring, flags_of
from dlrm.config.flags import is_named, parse_flags, value_of, without_replaced_aliases
from dlrm.errors import CheckpointError, ConfigError

PROG = "dlrm evaluate"
DESCRIPTION = """Scores the validation and test sets with a checkpoint's weights, and prints what training prints.

The flags below are those of training that count here. Each is as in the checkpoint's config.json unless it is given;
with --checkpoint PATH beside --help, the checkpoint's values stand as the defaults. World size, sharding and device
may be others than those that wrote the checkpoint, and so may the data. No run directory is written.

Example: `dlrm evaluate --checkpoint runs/first --split test --json test.json`; on two processes
`torchrun --nproc_per_node 2 -m dlrm.cli evaluate --checkpoint runs/first`."""

Stages = Literal["val", "test", "both"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Checkpoint, sets to score, and the flags of its run."""

    checkpoint: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Checkpoint (step_...); or a run directory, folder of checkpoints or address, whose newest sound one is taken."""

    split: Stages = "both"
    """Which of the held-out sets to score."""

    json: Annotated[str | None, optional("not written", "FILE")] = None
    """File to write: the metrics, and what they were scored with. - is standard output, which then has nothing else."""

    run: Config = field(default_factory=Config)


def parse_evaluate(argv: Sequence[str]) -> EvaluateConfig:
    """The flags of a command line. Their `run` is not final: `config_on_top` makes it, once the checkpoint is chosen.

    Raises:
        ConfigError: on an unknown flag, one that does not fit the checkpoint, or a file that can't be written.
        CheckpointError: if there is no checkpoint.
        SystemExit: after --help, with code 0.
    """
    if {"-h", "--help"} & set(argv):
        _show_help(argv)
    asked = parse_flags(EvaluateConfig, argv, PROG)
    for flag in ("recipe", "config"):
        if is_named(argv, flag):
            raise ConfigError(f"--{flag}: a checkpoint has its own config. Leave it out.")
    if asked.json is not None:
        check_output_file("json", asked.json, may_be_stream=True)
    locate(asked.checkpoint)
    with suppress(CheckpointError):  # the ranks report a damaged checkpoint, or take another one
        config_on_top(_read_config(asked.checkpoint), argv)
    return asked


def config_on_top(saved: Config, argv: Sequence[str]) -> Config:
    """The config to score a checkpoint with: that of the run that wrote it, with a command line's flags on top.

    Flags that only training reads have their defaults.

    Raises:
        ConfigError: if a flag would change the model, or would change nothing.
    """
    asked = parse_flags(
        EvaluateConfig, argv, PROG, default=EvaluateConfig(value_of(argv, "checkpoint") or "", run=saved)
    )
    config = without_replaced_aliases(asked.run, argv)
    _check_differences(saved, config, asked.split, argv)
    check_ranges(config.data)
    for flag in flags_of(config).values():
        if Scoring.IDLE in flag.rules or (Repeat.LEFT_OUT in flag.rules and not is_named(argv, flag.name)):
            config = flag.reset(config)
    batch_size = config.data.evaluation_batch_size
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=batch_size, test_batch_size=None)
    )
    for flag, _ in flags_without_effect(config):
        if not is_named(argv, flag.name):
            config = flag.reset(config)
    check_config(config)
    return config


def _check_differences(saved: Config, given: Config, split: Stages, argv: Sequence[str]) -> None:
    """Refuses flags that do not fit the weights, and flags that would change nothing.

    Raises:
        ConfigError: with these flags.
    """
    changed, flags = list(differences(saved, given)), flags_of(given)
    of_weights = [one for one in changed if Scoring.FIXED in flags[one.name].rules]
    if of_weights:
        shown = ", ".join(map(str, of_weights))
        raise ConfigError(f"the checkpoint was written with {shown}. Its weights fit no other value. Leave it out.")
    for difference in changed:
        if is_named(argv, difference.name) or is_named(argv, f"no_{difference.name}"):
            _check_effect(flags[difference.name], given, split)


def _check_effect(flag: Flag, given: Config, split: Stages) -> None:
    name, data = flag.name, given.data
    if Scoring.COUNTS not in flag.rules or (name == "seed" and not given.is_random):
        raise ConfigError(f"--{name}: changes nothing when a checkpoint is scored. Leave it out.")
    if name == "batch_size" and data.test_batch_size is not None:
        raise ConfigError(f"--batch_size: the run has --test_batch_size {data.test_batch_size}. Give that one.")
    other = {"limit_val_batches": "test", "limit_test_batches": "val"}.get(name)
    if other == split:
        raise ConfigError(f"--{name} with --split {split}: that set is not scored. Drop one of them.")


def _show_help(argv: Sequence[str]) -> None:
    """Prints the flags that count, with the values of --checkpoint, if it is given, as their defaults.

    Raises:
        CheckpointError: if the checkpoint can't be read.
        SystemExit: with code 0.
    """
    address = value_of(argv, "checkpoint")
    saved = Config() if address is None else _read_config(address)
    counting: dict[str, list[str]] = {}
    for flag in flags_of(saved).values():
        if Scoring.COUNTS in flag.rules:
            counting.setdefault(flag.section, []).append(flag.name)
    sections = {name: _show_only(getattr(saved, name), names) for name, names in counting.items()}
    run = dataclasses.make_dataclass(
        "Run", [(name, type(section), field(default=section)) for name, section in sections.items()], frozen=True
    )
    shown = dataclasses.make_dataclass(
        "Shown", [("run", run, field(default=run()))], bases=(EvaluateConfig,), frozen=True
    )
    parse_flags(shown, ["--help"], PROG, description=DESCRIPTION)


def _show_only(section: Any, names: Sequence[str]) -> Any:
    """The section as an instance of a subclass that shows only the fields `names` as flags."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    fields = [
        (one.name, hints[one.name] if one.name in names else tyro.conf.Suppress[hints[one.name]], one.default)
        for one in dataclasses.fields(section)
    ]
    shown = dataclasses.make_dataclass(type(section).__name__, fields, bases=(type(section),), frozen=True)
    return shown(**{one.name: getattr(section, one.name) for one in dataclasses.fields(section)})


def _read_config(address: str) -> Config:
    return read_newest(address, lambda _: None, lambda checkpoint: checkpoint.config)
