"""benchmarks/quality.py: what it runs, and how the two sides of a seed are told apart."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.figures import FIGURES
from dlrm.errors import ConfigError

AUROC = {("3", False): 0.75, ("3", True): 0.74, ("4", False): 0.79, ("4", True): 0.76}
"""Of a seed, on plain operators or not."""


def value_of(command: Sequence[str], flag: str) -> str:
    """The last one, which is the one that counts."""
    return command[len(command) - command[::-1].index(flag)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Seed, precision and operators of each run that was started; none trains."""
    started = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> None:
        seed, operators = value_of(command, "--seed"), env.get("DLRM_KERNELS", "own")
        started.append((seed, value_of(command, "--precision"), operators))
        auroc = AUROC[seed, operators == "none"]
        run_dir = Path(value_of(command, "--run_dir"))
        run_dir.mkdir()
        (run_dir / "summary.json").write_text(json.dumps({"val_auroc": [0.1, auroc], "test_auroc": auroc - 0.01}))

    monkeypatch.delenv("DLRM_KERNELS", raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(quality, "open_splits", lambda *_: None)
    monkeypatch.setattr(quality, "write_result", lambda path, result: Path(path).write_text(json.dumps(result)))
    return started


def call(*arguments: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("sys.argv", ["quality.py", "--data", "days", *arguments])
    quality.main()


def test_each_seed_runs_as_asked_and_on_plain_operators_in_fp32(
    runs: list[tuple[str, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    flags = ("--seeds", "3,4", "--against_plain", "--json", str(path), "--", "--precision", "int8")
    call(*flags, patch=monkeypatch)
    assert runs == [("3", "int8", "own"), ("3", "fp32", "none"), ("4", "int8", "own"), ("4", "fp32", "none")]
    result = json.loads(path.read_text())
    assert result["auroc_mean"]["val"] == pytest.approx(0.77)
    assert result["plain"]["auroc_mean"]["val"] == pytest.approx(0.75)
    assert result["difference"]["test"] == pytest.approx(0.02)
    figure = next(figure for figure in FIGURES if figure.file == "quality_int8_sample.json")
    # Differences of 0.01 and 0.03: a deviation of 0.01 * sqrt(2), over the square root of two seeds.
    assert figure.draw(result) == "val +0.0200 (0.0100), test +0.0200 (0.0100); 2 seeds"


def test_what_the_plain_side_would_refuse_is_refused_before_any_run(
    runs: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--allow_tf32 with --precision fp32"):
        call("--against_plain", "--", "--allow_tf32", patch=monkeypatch)
    assert runs == []
