"""What a run says of the way that it is started."""

import json

import pytest
import torch

from dlrm.config.config import Config
from dlrm.ranks.runtime import Runtime
from dlrm.train.run import _note_other_ranks
from dlrm.train.summary import explain_target


@pytest.mark.parametrize(("environment", "told"), [({"world_size": 2}, True), ({"world_size": 1}, False), ({}, False)])
def test_a_config_of_another_number_of_ranks(environment, told, tmp_path, capsys):
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    path = tmp_path / "config.json"
    _note_other_ranks(Config(config=str(path)), Runtime(0, 0, 1, 1, torch.device("cpu")))
    expected = f"{path} is of a run of 2 ranks; this one has 1.\n" if told else ""
    assert capsys.readouterr().out == expected


def test_a_config_from_elsewhere(tmp_path, capsys):
    for config in (Config(), Config(config=str(tmp_path / "config.json"))):
        _note_other_ranks(config, Runtime(0, 0, 1, 1, torch.device("cpu")))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("aurocs", "words"),
    [
        ([0.7, None, 0.75, 0.6], "the best validation has 0.750000."),
        ([None], "and AUROC is undefined, as the validation set has one class only."),
        ([], "and nothing was validated."),
    ],
)
def test_a_target_that_was_not_reached(aurocs, words):
    told = explain_target(0.8, aurocs)
    assert told.startswith("The target was not reached: --validation_auroc 0.8, ")
    assert told.endswith(words)
