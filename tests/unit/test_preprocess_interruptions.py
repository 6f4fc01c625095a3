"""`dlrm preprocess` killed, resumed, run twice at a time and on two ranks."""

import gzip
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dlrm.errors import ConfigError, DatasetError
from dlrm.preprocess import pipeline as pipeline_module
from dlrm.preprocess import raw as raw_module
from dlrm.preprocess import workspace as workspace_module
from dlrm.preprocess.command import preprocess
from dlrm.preprocess.ranks import Ranks
from tests.conftest import file_size_limit
from tests.unit.preprocessed import arrays_of, command, config_of, digests, write


def test_an_unfinished_run_is_gone_on_with(raw, monkeypatch):
    reference = digests(write(raw, output="undisturbed"))
    for stage in ("count", "encode", "shuffle", "check"):

        def fail(*_, stage: str = stage) -> None:
            raise KeyboardInterrupt(stage)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline_module, stage, fail)
            with pytest.raises(KeyboardInterrupt):
                preprocess(config_of(raw, resume=True), Ranks())
        assert not (raw.parent / "days").exists()
    with pytest.raises(ConfigError, match=r"days.partial: holds an unfinished run. Continue with --resume"):
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


def test_files_in_another_order_are_not_continued_with(raw, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, "count", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(config_of(raw), Ranks())
    with pytest.raises(ConfigError, match="--resume: order of raw files was"):
        write(raw, "day_1.tsv", "day_0.tsv", "day_2.tsv", resume=True)


def times_of(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def stop_at(stage: str, raw: Path, monkeypatch, **fields) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline_module, stage, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(config_of(raw, **fields), Ranks())
    return raw.parent / "days.partial" / "done"


def test_a_file_that_was_cut_short_and_is_fetched_again(raw, monkeypatch):
    reference = digests(write(raw, output="undisturbed"))
    text = (raw / "day_1.tsv").read_bytes()
    names = ("day_0.tsv", "day_1.tsv.gz", "day_2.tsv")
    packed = raw / "day_1.tsv.gz"
    packed.write_bytes(gzip.compress(text)[:-3000])
    monkeypatch.setattr(raw_module, "_READ_BYTES", 8_000)
    monkeypatch.setattr(raw_module, "_SAMPLE_BYTES", 20_000)  # of a large file the sample says nothing of its end
    with pytest.raises(DatasetError, match=r"day_1.tsv.gz: can't be read .* again, and continue with --resume"):
        write(raw, *names)
    finished = {"parse/day_0.json", "parse/day_0.000000.json"}
    times = times_of(raw.parent / "days.partial" / "done")
    assert finished <= times.keys()
    packed.write_bytes(gzip.compress(text))
    monkeypatch.setattr(workspace_module.Workspace, "_remove", lambda _: None)
    folder = write(raw, *names, resume=True)
    again = times_of(raw.parent / "days.partial" / "done")
    assert {name: again[name] for name in finished} == {name: times[name] for name in finished}
    assert arrays_of(digests(folder)) == arrays_of(reference)


@pytest.mark.parametrize("fields", [{}, {"compat": "torchrec"}])
@pytest.mark.parametrize("stage", ["count", "encode", "shuffle", "check"])
def test_what_depends_on_a_file_that_changed_is_done_again(stage, fields, raw, lines, monkeypatch, capsys):
    done = stop_at(stage, raw, monkeypatch, **fields)
    times = times_of(done)
    (raw / "day_1.tsv").write_text("".join(lines[1][:-7]))
    capsys.readouterr()
    monkeypatch.setattr(workspace_module.Workspace, "_remove", lambda _: None)
    found = digests(write(raw, resume=True, **fields))
    said = capsys.readouterr().out
    assert f"{raw}/day_1.tsv has changed since the run began: it is read again." in said
    assert "day_0.tsv has changed" not in said
    if stage != "check":  # by then no parsed rows are left
        assert times_of(done)["parse/day_0.000000.json"] == times["parse/day_0.000000.json"]
    monkeypatch.undo()
    assert found == digests(write(raw, output="scratch", **fields))


@pytest.mark.parametrize("stage", ["count", "shuffle", "check"])
def test_a_file_of_the_same_content_keeps_all_that_is_finished(stage, raw, monkeypatch):
    done = stop_at(stage, raw, monkeypatch)
    times = times_of(done)
    (raw / "day_1.tsv").touch()
    monkeypatch.setattr(workspace_module.Workspace, "_remove", lambda _: None)
    found = digests(write(raw, resume=True))
    kept = {name for name in times if not name.startswith(("parse/day_1.json", "content"))}
    again = times_of(done)
    assert {name: again[name] for name in kept} == {name: times[name] for name in kept}
    monkeypatch.undo()
    assert found == digests(write(raw, output="scratch"))


def test_a_run_is_continued_from_another_folder(raw, monkeypatch):
    stop_at("count", raw, monkeypatch)
    monkeypatch.chdir(raw)
    config = config_of(raw, resume=True)
    preprocess(replace(config, raw=tuple(Path(path).name for path in config.raw)), Ranks())
    assert (raw.parent / "days" / "manifest.json").exists()


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


@pytest.mark.parametrize(("kib", "fields"), [(8, {}), (330, {}), (500, {}), (700, {}), (330, {"compat": "torchrec"})])
def test_a_disk_that_fills_is_said_to_be_full_and_what_is_finished_counts(kib, fields, raw, small_disk, monkeypatch):
    reference = digests(write(raw, output="undisturbed", **fields))
    disk = small_disk(f"size={kib}k")
    config = config_of(raw, output=str(disk / "days"), **fields)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**50))
        with pytest.raises(DatasetError, match="the disk is full") as caught:
            preprocess(config, Ranks())
    assert re.fullmatch(
        rf"{disk}/days.partial/[\w/.]+: can't be written \(the disk is full\). Fix that, and continue with --resume: "
        "what is finished is kept.",
        str(caught.value),
    )
    assert not (disk / "days").exists()
    small_disk("size=8m")
    finished = {path: path.stat().st_mtime_ns for path in (disk / "days.partial" / "done").rglob("*.json")}
    assert finished or kib == 8
    monkeypatch.setattr(workspace_module.Workspace, "_remove", lambda _: None)
    preprocess(replace(config, resume=True), Ranks())
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert digests(disk / "days") == reference


@pytest.mark.parametrize("limit", [1 << 10, 20 << 10, 60 << 10])
def test_a_limit_of_file_sizes_is_named(limit, raw):
    reason = rf"the file-size limit of {limit:,} bytes, `ulimit -f`, is reached"
    words = rf"days.partial/.*: can't be written \({reason}\). .* --resume"
    with file_size_limit(limit), pytest.raises(DatasetError, match=words):
        preprocess(config_of(raw), Ranks())
    assert digests(write(raw, resume=True)) == digests(write(raw, output="undisturbed"))


def test_two_runs_on_one_folder(raw):
    with workspace_module.Workspace(raw.parent / "days") as workspace:
        workspace.open({}, resume=False)
        with pytest.raises(ConfigError, match=r"days.partial: another run is using it"):
            preprocess(config_of(raw, resume=True), Ranks())


def test_a_stage_is_forgotten_by_every_rank(tmp_path):
    first, second = (workspace_module.Workspace(tmp_path / "days") for _ in range(2))
    with first:
        first.finish("scatter", "day_0", {"clamped": 0})
    assert second.facts("scatter", "day_0") == {"clamped": 0}
    first.forget("scatter")
    second.forget("scatter")
    assert first.facts("scatter", "day_0") is second.facts("scatter", "day_0") is None


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
