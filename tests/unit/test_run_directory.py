import importlib.metadata
import json
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dlrm.config.config import Config, DataConfig, OutputConfig
from dlrm.config.recipes import RECIPES
from dlrm.errors import RunDirectoryError
from dlrm.ranks.runtime import Runtime
from dlrm.system import environment, lock
from dlrm.system.environment import describe_software
from dlrm.system.files import sha256_of
from dlrm.system.lock import Locks
from dlrm.train import run_directory
from dlrm.train.environment import describe_environment, launch_id
from dlrm.train.run_directory import RunDirectory

RUNTIME = Runtime(3, 1, 4, 2, torch.device("cpu"))


def config_at(path) -> Config:
    return Config(output=OutputConfig(run_dir=str(path)))


def test_check_makes_nothing(tmp_path):
    path = tmp_path / "several" / "levels" / "down"
    assert RunDirectory.locate(config_at(path)) == path
    RunDirectory(path).check(Config(), may_resume=True)
    assert not RunDirectory(path).holds_run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Config(), "random"),
        (Config(data=DataConfig(in_memory_binary_criteo_path="days")), "criteo_1t"),
        (Config(data=DataConfig(in_memory_binary_criteo_path="d", dataset_name="criteo_kaggle")), "criteo_kaggle"),
        (RECIPES["debug_cpu"](), "debug_cpu"),
    ],
)
def test_the_default_folder_says_what_and_when(config, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.fullmatch(rf"runs/\d{{8}}-\d{{6}}-{name}", str(RunDirectory.locate(config)))


def test_a_folder_that_holds_a_run(tmp_path):
    (tmp_path / "notes.txt").touch()
    directory = RunDirectory(tmp_path)
    directory.check(Config(), may_resume=True)
    assert not directory.holds_run()
    (tmp_path / "config.json").touch()
    directory.check(Config(), may_resume=True)
    assert directory.holds_run()
    assert not directory.is_finished()
    with pytest.raises(RunDirectoryError, match=f"--run_dir {tmp_path}: holds a run already"):
        directory.check(Config(), may_resume=False)
    (tmp_path / "summary.json").touch()
    with pytest.raises(RunDirectoryError, match=f"--run_dir {tmp_path}: holds a finished run"):
        directory.check(Config(), may_resume=True)
    assert directory.is_finished()


def test_the_folder_of_the_launch_that_is_started_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name, launch in (("first", "another launch"), ("second", launch_id()), ("third", "another launch")):
        write_json_at(tmp_path / "runs" / name, launch)
    assert RunDirectory.locate(Config()) == Path("runs", "second")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert RunDirectory.locate(Config()).name not in ("first", "second", "third")


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, starts = Path("runs", "20261130-120000-random"), threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool, ExitStack() as refused:
        locks = [refused.enter_context(Locks()) for _ in range(8)]

        def claim(own: Locks) -> Path:
            starts.wait(20)
            return RunDirectory.claim(path, Config(), own)

        claimed = list(pool.map(claim, locks))
        assert {one.name for one in claimed} == {path.name, *(f"{path.name}-{number}" for number in range(2, 9))}
        (claimed[3] / "config.json").touch()
        assert all(one.is_dir() for one in claimed)
    assert list(Path("runs").iterdir()) == [claimed[3]]


def test_a_folder_that_is_named_or_was_begun_by_this_launch_is_not_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Locks() as locks:
        assert RunDirectory.claim(Path("mine"), config_at("mine"), locks) == Path("mine")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        write_json_at(tmp_path / "runs" / "before", launch_id())
        assert RunDirectory.claim(RunDirectory.locate(Config()), Config(), locks) == Path("runs", "before")
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]
    assert list(Path("runs").iterdir()) == [Path("runs", "before")]


def test_a_default_folder_that_can_not_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()
    with Locks() as locks, pytest.raises(RunDirectoryError, match="--run_dir runs/x: runs is not a folder"):
        RunDirectory.claim(Path("runs", "x"), Config(), locks)


def test_a_default_folder_below_a_link_that_leads_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("scratch/runs")
    with Locks() as locks, pytest.raises(RunDirectoryError, match="runs"):
        RunDirectory.claim(Path("runs", "x"), Config(), locks)


def write_json_at(folder, launch):
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(json.dumps({"launch": launch}))


def test_two_runs_on_one_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "_SECONDS", 0.3)
    with Locks() as locks:
        RunDirectory.open(tmp_path / "run", Config(), {}, {}, locks, None)
        assert locks.take(tmp_path / "run", "--run_dir run").holds(tmp_path / "run")
        with Locks() as others, pytest.raises(RunDirectoryError, match="--run_dir run: another run is using it"):
            others.take(tmp_path / "run", "--run_dir run")
    assert "another run is using it. Waiting" in capsys.readouterr().out
    with Locks() as others, pytest.raises(RunDirectoryError, match="another run has just begun there"):
        RunDirectory.open(tmp_path / "run", Config(), {}, {}, others, None)


def test_a_run_without_a_checkpoint_is_kept(tmp_path):
    with Locks() as locks:
        RunDirectory.open(tmp_path, Config(), {"attempt": 1}, {}, locks, None).append_metrics({"step": 1})
    for number in (1, 2):
        with Locks() as locks:
            locks.take(tmp_path, "")
            RunDirectory.open(tmp_path, Config(), {"attempt": number + 1}, {}, locks, None)
        assert json.loads((tmp_path / f"attempt-{number}" / "environment.json").read_text()) == {"attempt": number}
        assert not (tmp_path / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "attempt-1" / "metrics.jsonl").read_text()) == {"step": 1}


def test_a_resumed_run_has_the_metrics_of_its_checkpoint(tmp_path):
    with Locks() as locks:
        first = RunDirectory.open(tmp_path, Config(), {}, {}, locks, None)
        first.append_metrics({"step": 1})
        line = (tmp_path / "metrics.jsonl").read_bytes()
        first.append_metrics({"step": 2})
        second = RunDirectory.open(tmp_path, Config(), {}, {}, locks, line)
    assert second.lines() == [{"step": 1}]
    assert second.documents()["metrics.jsonl"] == line
    assert not list(tmp_path.glob("attempt-*"))


@pytest.mark.parametrize("below", ["", "run"])
def test_a_checkpoint_is_no_run_directory(below, tmp_path):
    path = tmp_path / "checkpoints" / "step_0000000020" / below
    path.mkdir(parents=True)
    with pytest.raises(
        RunDirectoryError, match=r"is or lies in a checkpoint\. To continue training from one: --resume"
    ):
        RunDirectory(path).check(Config(), may_resume=True)


def test_a_restart_that_a_lost_host_makes_necessary_is_known_by_its_launch(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    write_json_at(tmp_path / "first", launch_id())
    write_json_at(tmp_path / "second", "another launch")
    known = [RunDirectory(tmp_path / name).is_of_this_launch() for name in ("first", "second", "third")]
    assert known == [True, False, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert RunDirectory(tmp_path / "third").is_of_this_launch()


def test_a_lock_that_is_a_link(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with Locks() as locks, pytest.raises(RunDirectoryError, match="can't be written"):
        RunDirectory.open(tmp_path, Config(), {}, {}, locks, None)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("below", ["", "run", "several/levels"])
def test_a_file_in_the_folders_place(below, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / below
    with pytest.raises(RunDirectoryError, match=f"--run_dir {path}: {tmp_path / 'file'} is not a folder"):
        RunDirectory(path).check(Config(), may_resume=True)
    expected = rf"{path}: can't be written \(.+\). Fix that and start"
    with Locks() as locks, pytest.raises(RunDirectoryError, match=expected):
        RunDirectory.open(path, Config(), {}, {}, locks, None)


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory.os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(RunDirectoryError, match=f"no permission to write in {tmp_path}"):
        RunDirectory(tmp_path / "run").check(Config(), may_resume=True)


def test_open_writes_what_the_run_is(tmp_path):
    path = tmp_path / "runs" / "first"
    config = replace(RECIPES["mlperf_v2"](), output=OutputConfig(run_dir=str(path)))
    with Locks() as locks:
        directory = RunDirectory.open(path, config, {"host": "here"}, {"tables": [1]}, locks, None)
    assert directory.path == path
    assert sorted(file.name for file in path.glob("[!.]*")) == ["config.json", "environment.json", "plan.json"]
    assert Config.load(path / "config.json") == config
    assert json.loads((path / "environment.json").read_text()) == {"host": "here"}
    assert json.loads((path / "plan.json").read_text()) == {"tables": [1]}
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        RunDirectory(path).check(config, may_resume=False)


def test_metrics_are_lines_of_json(tmp_path):
    directory = RunDirectory(tmp_path)
    lines = [{"step": 1, "loss": 0.25}, {"step": 2, "loss": 0.125, "auroc": None}]
    for line in lines:
        directory.append_metrics(line)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines
    with pytest.raises(ValueError, match="JSON"):
        directory.append_metrics({"loss": float("nan")})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_summary(tmp_path):
    RunDirectory(tmp_path).write_summary({"test_auroc": 0.75})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"test_auroc": 0.75}


@pytest.mark.parametrize("write", [RunDirectory.append_metrics, RunDirectory.write_summary])
def test_a_folder_that_is_gone(write, tmp_path):
    with pytest.raises(
        RunDirectoryError, match=rf"{tmp_path / 'gone'}: can't be written \(No such file or directory\)"
    ):
        write(RunDirectory(tmp_path / "gone"), {})


def test_environment(tmp_path):
    environment = describe_environment(RUNTIME, Config(), "abc")
    assert (environment["world_size"], environment["local_world_size"]) == (4, 2)
    assert environment["device"] == RUNTIME.device_name == "cpu"
    assert environment["threads_per_rank"] == torch.get_num_threads()
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert environment["versions"]["torchrec"] == importlib.metadata.version("torchrec")
    assert environment["data_manifest_sha256"] is None
    assert environment["data_fingerprint"] == "abc"
    assert json.loads(json.dumps(environment)) == environment


def test_environment_identifies_the_data(tmp_path):
    config = Config(data=DataConfig(in_memory_binary_criteo_path=str(tmp_path)))
    assert describe_environment(RUNTIME, config, None)["data_manifest_sha256"] is None
    (tmp_path / "manifest.json").write_text("{}")
    digest = describe_environment(RUNTIME, config, None)["data_manifest_sha256"]
    assert digest == sha256_of(tmp_path / "manifest.json")


def test_commit(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    module = tmp_path / "dlrm" / "environment.py"
    module.parent.mkdir()
    module.touch()
    monkeypatch.setattr(environment, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_software()["commit"] is None
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert describe_software()["commit"] == head
    module.write_text("changed")
    assert describe_software()["commit"] == f"{head}-dirty"
