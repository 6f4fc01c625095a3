import copy
import json
import pickle
from dataclasses import replace

import pytest

from dlrm.config.config import CheckpointConfig, Config, DataConfig, TrainingConfig
from dlrm.config.flags import parse_args
from dlrm.config.interval import Interval
from dlrm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "steps", "seconds", "is_never"),
    [
        ("500", 500, None, False),
        ("30m", None, 1800.0, False),
        ("0.5m", None, 30.0, False),
        ("never", None, None, True),
    ],
)
def test_three_ways_to_say_how_often(text, steps, seconds, is_never):
    interval = Interval(text)
    assert (interval.steps, interval.seconds, interval.is_never) == (steps, seconds, is_never)
    assert copy.deepcopy(interval).steps == pickle.loads(pickle.dumps(interval)).steps == steps
    config = parse_args(["--checkpoint_every", text])
    assert config.checkpoint.checkpoint_every == interval
    assert isinstance(config.checkpoint.checkpoint_every, Interval)


@pytest.mark.parametrize("text", ["", "0", "0m", "0.0m", "m", "1.5", "-3", "3h", "500 ", "often", "1" + 15 * "0"])
def test_other_words_are_refused(text):
    with pytest.raises(ConfigError) as refused:
        parse_args([f"--checkpoint_every={text}"])
    expected = "expected steps, as in 500, minutes, as in 30m, or never"
    assert str(refused.value) == f"--checkpoint_every {text}: {expected}"


@pytest.mark.parametrize("text", ["500", "30m", "1.50m", "never", None])
def test_json_has_the_text(text):
    every = None if text is None else Interval(text)
    config = Config(checkpoint=CheckpointConfig(checkpoint_every=every))
    content = json.loads(json.dumps(config.to_json()))
    assert content["checkpoint"]["checkpoint_every"] == text
    assert Config.from_json(content) == config
    restored = Config.from_json(content).checkpoint.checkpoint_every
    assert type(restored) is type(every)


@pytest.mark.parametrize("value", ["often", 5, 1.5, True, ["5"]])
def test_json_with_something_else_is_refused(value):
    content = Config().to_json()
    content["checkpoint"]["checkpoint_every"] = value
    with pytest.raises(ConfigError, match="checkpoint_every"):
        Config.from_json(content)


def test_what_the_flags_leave_open_is_filled_in():
    days = DataConfig(in_memory_binary_criteo_path="days")
    assert Config().resolve(None).checkpoint.checkpoint_every == "never"
    assert Config(data=days).resolve(None).checkpoint.checkpoint_every == "30m"
    given = Config(data=days, checkpoint=CheckpointConfig(checkpoint_every=Interval("7")))
    assert given.resolve(None).checkpoint.checkpoint_every.steps == 7

    seeds = {Config().resolve(None).training.seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(seed is not None and 0 <= seed < 2**31 for seed in seeds)
    seeded = Config(training=TrainingConfig(seed=0))
    assert seeded.resolve(None).training.seed == 0
    assert Config().resolve(seeded).training.seed == 0
    unchanged = given.resolve(None)
    assert replace(unchanged, training=given.training) == given
