"""`dlrm preprocess` killed, resumed, run twice at a time and on two ranks."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlrm.errors import ConfigError
from dlrm.preprocess import pipeline as pipeline_module
from dlrm.preprocess import workspace as workspace_module
from dlrm.preprocess.command import preprocess
from dlrm.preprocess.ranks import Ranks
from tests.unit.preprocessed import command, config_of, digests, write


def test_an_unfinished_run_is_gone_on_with(raw, monkeypatch):
    reference = digests(write(raw, output="undisturbed"))
    for stage in ("count", "encode", "shuffle", "verify"):

        def fail(*_, stage: str = stage) -> None:
            raise KeyboardInterrupt(stage)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline_module, stage, fail)
            with pytest.raises(KeyboardInterrupt):
                preprocess(config_of(raw, resume=True), Ranks())
        assert not (raw.parent / "days").exists()
    with pytest.raises(ConfigError, match=r"days.partial: holds an unfinished run. Go on with --resume"):
        preprocess(config_of(raw), Ranks())
    with pytest.raises(ConfigError, match="--resume: seed was 0 and is 4"):
        preprocess(config_of(raw, resume=True, seed=4), Ranks())
    assert digests(write(raw, resume=True)) == reference
    assert not (raw.parent / "days.partial").exists()
    preprocess(config_of(raw, resume=True), Ranks())  # finished already
    assert digests(raw.parent / "days") == reference


@pytest.mark.parametrize("moment", ["rename", "rmtree"])
def test_killed_while_the_output_gets_its_name(moment, raw, monkeypatch):
    reference = digests(write(raw, output="undisturbed"))
    owner = Path if moment == "rename" else workspace_module.shutil
    usual = getattr(owner, moment)

    def fail(path: Path, *arguments, **options) -> None:
        if path.name in ("days", "done"):
            raise KeyboardInterrupt
        usual(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, fail)
        with pytest.raises(KeyboardInterrupt):
            write(raw)
    assert (raw.parent / "days.partial").exists()
    assert digests(write(raw, resume=True)) == reference
    assert not (raw.parent / "days.partial").exists()


def test_raw_files_that_changed_are_not_gone_on_with(raw, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "count", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(config_of(raw), Ranks())
    with pytest.raises(ConfigError, match="--resume: order of raw files was"):
        write(raw, "day_1.tsv", "day_0.tsv", "day_2.tsv", resume=True)
    (raw / "day_0.tsv").write_text((raw / "day_1.tsv").read_text())
    with pytest.raises(ConfigError, match=r"--resume: .*day_0.tsv is not the file that the run began with"):
        preprocess(config_of(raw, resume=True), Ranks())


def test_kill_at_any_moment_and_resume(raw, lines):
    """A short version of `python -m benchmarks.preprocess kills`: killed once each stage has finished a part."""
    for day, text in enumerate(lines):
        (raw / f"day_{day}.tsv").write_text("".join(text) * 40)
    reference = digests(write(raw, output="undisturbed"))
    done = raw.parent / "killed.partial" / "done"
    killed = 0
    for stage in ("parse", "count", "encode", "scatter", "gather", "verify"):
        process = subprocess.Popen(command(raw, "killed", "--resume"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and not (done / stage).exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), (out, err)
        killed += process.returncode != 0
    assert killed >= 4
    assert digests(write(raw, output="killed", resume=True)) == reference


def test_two_runs_on_one_folder(raw):
    with workspace_module.Workspace(raw.parent / "days") as workspace:
        workspace.open({}, resume=False)
        with pytest.raises(ConfigError, match=r"days.partial: another process is at work there"):
            preprocess(config_of(raw, resume=True), Ranks())


def test_two_ranks_write_the_same(raw):
    reference = digests(write(raw, output="alone"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    done = subprocess.run(
        [*launch, "--rdzv_endpoint", "localhost:0", "--no_python", *command(raw, "days")],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rows/s)") == 1
    assert digests(raw.parent / "days") == reference
