"""A flag is declared once: its field has its rules, and what reads them needs no list of names."""

import dataclasses
from typing import Annotated

import pytest
from annotated_types import Gt

from dlrm.checkpoint.compatibility import misfits
from dlrm.cli import main
from dlrm.config.checks import check_config, flags_without_effect
from dlrm.config.config import Config, OutputConfig
from dlrm.config.field_rules import AliasOf, Flag, NoEffect, Repeat, Resume, Scoring, flags_of, needs
from dlrm.config.flags import parse_flags, settle
from dlrm.errors import ConfigError
from dlrm.evaluate import config as evaluate

FLAGS = flags_of(Config())


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("kind", [Resume, Scoring])
def test_every_flag_says_what_it_means_to_a_checkpoint(flag: Flag, kind: type) -> None:
    assert len([rule for rule in flag.rules if isinstance(rule, kind)]) == 1, (
        f"--{flag.name}: expected one rule of {kind.__name__} in its field's type (see dlrm/config/field_rules.py)"
    )


def test_a_flag_is_known_by_its_name_alone() -> None:
    fields = [field for section in dataclasses.fields(Config) for field in _fields_of(section.name)]
    assert len(FLAGS) == len(fields)


def _fields_of(section: str) -> list[str]:
    owner = getattr(Config(), section)
    return [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else [section]


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_what_a_rule_names_exists(flag: Flag) -> None:
    for rule in flag.rules:
        if isinstance(rule, AliasOf):
            assert type(flag.default) is bool
            assert FLAGS[rule.flag].default is None
            assert FLAGS[rule.flag].section == flag.section
        if isinstance(rule, NoEffect):
            assert rule.is_idle(Config()) in (True, False)


def test_a_rule_that_needs_another_flag() -> None:
    config = Config(output=OutputConfig(log_every=3))
    assert not needs("log_every").is_idle(config)
    assert needs("profile").is_idle(config)
    assert needs("profile").why == "needs --profile"
    assert not needs("checkpoint_mode", "async").is_idle(config)
    assert needs("checkpoint_mode", "sync").is_idle(config)
    assert needs("checkpoint_mode", "sync").why == "needs --checkpoint_mode sync"


@dataclasses.dataclass(frozen=True)
class NewOutput(OutputConfig):
    """Flags that nothing else in the project names."""

    shaping: Annotated[int, Gt(0), Resume.FIXED, Scoring.COUNTS] = 1
    """Something that a resumed training must keep."""

    telling: Annotated[str, Resume.FREE, Scoring.FIXED, Repeat.LEFT_OUT] = "a"
    """Something that the weights depend on."""

    idling: Annotated[int, Resume.TAKEN_OVER, Scoring.IDLE, needs("profile")] = 0
    """Something that does nothing alone."""


@dataclasses.dataclass(frozen=True)
class NewConfig(Config):
    """A run with such flags."""

    output: NewOutput = dataclasses.field(default_factory=NewOutput)


def new(**fields: object) -> NewConfig:
    return NewConfig(output=NewOutput(**fields))


def test_a_new_flag_is_one_field() -> None:
    assert parse_flags(NewConfig, ["--shaping", "3", "--telling=b"], "test") == new(shaping=3, telling="b")
    with pytest.raises(ConfigError, match="--shaping 0: expected more than 0"):
        check_config(new(shaping=0))


def test_a_new_flag_without_effect_is_refused_if_it_is_given() -> None:
    assert [(flag.name, why) for flag, why in flags_without_effect(new(idling=2))] == [("idling", "needs --profile")]
    assert list(flags_without_effect(new(idling=2, profile=3))) == []
    assert settle(new(idling=2), []) == new()
    with pytest.raises(ConfigError, match="--idling 2 needs --profile"):
        settle(new(idling=2), ["--idling", "2"])


def test_a_new_flag_when_a_training_is_resumed() -> None:
    saved, given = new(shaping=2, idling=4), new(shaping=3, telling="b", idling=5)
    assert [difference.name for difference in misfits(saved, given)] == ["shaping", "idling"]
    assert misfits(saved, new(shaping=2, telling="b", idling=4)) == []


def test_a_new_flag_when_a_checkpoint_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dataclasses.make_dataclass(
        "Asked",
        [("run", NewConfig, dataclasses.field(default_factory=NewConfig))],
        bases=(evaluate.EvaluateConfig,),
        frozen=True,
    )
    monkeypatch.setattr(evaluate, "EvaluateConfig", asked)
    saved = new(shaping=2, telling="b", idling=4, profile=3)
    start = ["--checkpoint", "x"]
    assert evaluate.config_on_top(saved, start).output == NewOutput(shaping=2)
    assert evaluate.config_on_top(saved, [*start, "--shaping", "5"]).output.shaping == 5
    with pytest.raises(ConfigError, match="the checkpoint was written with --telling b"):
        evaluate.config_on_top(saved, [*start, "--telling", "c"])
    with pytest.raises(ConfigError, match="--idling: changes nothing when a checkpoint is scored"):
        evaluate.config_on_top(saved, [*start, "--idling", "5"])


def test_the_help_of_evaluation_shows_what_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    shown = capsys.readouterr().out.replace("│", " ").split()
    for flag in FLAGS.values():
        assert (f"--{flag.name}" in [word.strip(",") for word in shown]) == (Scoring.COUNTS in flag.rules), flag.name
