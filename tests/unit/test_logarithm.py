"""The logarithm of this machine, and work that began on another one."""

import json

import pytest

from dlrm.errors import ConfigError
from dlrm.preprocess import logarithm as logarithm_module
from dlrm.preprocess.command import preprocess
from dlrm.preprocess.ranks import Ranks
from tests.unit.preprocessed import config_of, digests, write


def test_another_logarithm_does_not_go_on(raw, monkeypatch):
    reference = digests(write(raw, output="undisturbed"))
    with monkeypatch.context() as patch:
        patch.setattr("dlrm.preprocess.pipeline.count", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(config_of(raw), Ranks())
    with monkeypatch.context() as patch:
        patch.setattr(logarithm_module, "digest_logarithm", lambda: "another")
        with pytest.raises(ConfigError, match=r"days.partial: was begun on a machine whose logarithm differs"):
            preprocess(config_of(raw, resume=True), Ranks())
    assert digests(write(raw, resume=True)) == reference


def test_another_logarithm_than_the_vocabularys_is_told(raw, monkeypatch, capsys):
    first = write(raw)
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["integers"]["logarithm"] == logarithm_module.digest_logarithm()
    write(raw, "day_2.tsv", vocabulary=str(first), output="same")
    assert "Warning" not in capsys.readouterr().out
    monkeypatch.setattr(logarithm_module, "digest_logarithm", lambda: "another")
    write(raw, "day_2.tsv", vocabulary=str(first), output="later")
    assert "Warning: this machine's logarithm differs from that of the vocabulary's days" in capsys.readouterr().out
    del manifest["integers"]["logarithm"]  # of an older version
    (first / "manifest.json").write_text(json.dumps(manifest))
    write(raw, "day_2.tsv", vocabulary=str(first), output="old")
    assert "Warning" not in capsys.readouterr().out
