import math

import pytest

from dlrm.config.checks import check_config
from dlrm.config.config import Config, OptimizerConfig
from dlrm.errors import ConfigError
from dlrm.train.schedule import FLOOR, learning_rate_at


def rates(steps: int, **fields: float) -> list[float]:
    config = OptimizerConfig(**fields)
    return [learning_rate_at(step, config.learning_rate, config) for step in range(1, steps + 1)]


def test_no_schedule_is_a_constant_rate():
    assert rates(3, learning_rate=0.5) == [0.5, 0.5, 0.5]


def test_warm_up_reaches_the_full_rate_and_stays_there():
    assert rates(6, learning_rate=2.0, lr_warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_decay_without_warm_up():
    got = rates(8, learning_rate=8.0, lr_decay_start=2, lr_decay_steps=4)
    assert got == [8.0, 8.0, 8.0 * (3 / 4) ** 2, 8.0 * (2 / 4) ** 2, 8.0 * (1 / 4) ** 2, FLOOR, FLOOR, FLOOR]


def test_all_three_parts():
    got = rates(9, learning_rate=1.0, lr_warmup_steps=2, lr_decay_start=4, lr_decay_steps=3)
    expected = [0.5, 1.0, 1.0, 1.0, 4 / 9, 1 / 9, FLOOR, FLOOR, FLOOR]
    assert all(map(math.isclose, got, expected))


def test_decay_right_after_the_warm_up():
    got = rates(4, learning_rate=1.0, lr_warmup_steps=2, lr_decay_start=2, lr_decay_steps=2)
    assert got == [0.5, 1.0, 0.25, FLOOR]


def test_a_rate_below_the_floor_is_kept():
    assert rates(3, learning_rate=1e-9, lr_decay_start=1, lr_decay_steps=1) == [1e-9] * 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"lr_warmup_steps": 5, "lr_decay_start": 4, "lr_decay_steps": 2},
            "--lr_decay_start 4: expected .* 5, or more",
        ),
        ({"lr_decay_start": 4}, "--lr_decay_start 4 needs --lr_decay_steps"),
        ({"lr_warmup_steps": -1}, "--lr_warmup_steps -1: expected 0 or more"),
    ],
)
def test_schedules_that_make_no_sense(fields, words):
    with pytest.raises(ConfigError, match=words):
        check_config(Config(optimizer=OptimizerConfig(**fields)))
