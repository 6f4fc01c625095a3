import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm.checkpoint.compatibility import Difference, differences, misfits, model_misfits
from dlrm.config.config import Config
from dlrm.config.field_rules import Resume, flags_of

FIELDS = [(flag.section, flag.name) for flag in flags_of(Config()).values() if flag.section]


def with_field(section: str, name: str, value: Any, config: Config | None = None) -> Config:
    config = config or Config()
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


def is_free(section: str, name: str) -> bool:
    flag = flags_of(Config())[name]
    assert flag.section == section
    return Resume.FIXED not in flag.rules


def test_what_may_change():
    """Where tables lie, how many ranks share a batch, what is reported: nothing that a step's result depends on."""
    free = {"sharding": 8, "evaluation": 4, "checkpoint": 10, "output": 8, "data": 8, "training": 6}
    counts = {section: sum(is_free(*field) for field in FIELDS if field[0] == section) for section, _ in FIELDS}
    assert counts == {**free, "model": 0, "optimizer": 0}


def test_a_config_fits_itself():
    assert list(differences(Config(), Config())) == []
    assert misfits(Config(), Config()) == []


@given(st.sampled_from([field for field in FIELDS if not is_free(*field) and field[1] not in ("optimizer", "adagrad")]))
def test_a_field_that_shapes_the_training_must_stay(field):
    section, name = field
    changed = with_field(section, name, "another value")
    found = [Difference(section, name, getattr(getattr(Config(), section), name), "another value")]
    assert misfits(Config(), changed) == found
    assert model_misfits(Config(), changed) == (found if section == "model" else [])


@given(st.sampled_from([field for field in FIELDS if is_free(*field) and field[1] != "seed"]))
def test_a_field_that_does_not_may_change(field):
    changed = with_field(*field, "another value")
    assert misfits(Config(), changed) == []
    assert [(one.section, one.name) for one in differences(Config(), changed)] == [field]


@pytest.mark.parametrize(("given_seed", "fits"), [(None, True), (3, True), (4, False)])
def test_the_seed_is_the_one_that_was_drawn(given_seed, fits):
    saved = with_field("training", "seed", 3)
    found = misfits(saved, with_field("training", "seed", given_seed))
    assert [str(difference) for difference in found] == ([] if fits else ["--seed 3 (here 4)"])


def test_two_names_of_one_optimizer():
    short, long = with_field("optimizer", "adagrad", True), with_field("optimizer", "optimizer", "adagrad")
    assert misfits(short, long) == misfits(long, short) == []
    found = misfits(Config(), long)
    assert [difference.name for difference in found] == ["optimizer"]


def test_a_difference_in_words():
    saved = with_field("model", "dense_arch_layer_sizes", (16, 8))
    changed = with_field("model", "dense_arch_layer_sizes", (8,))
    assert [str(difference) for difference in misfits(saved, changed)] == ["--dense_arch_layer_sizes 16,8 (here 8)"]
