import importlib.metadata
import json
import re
import subprocess
from dataclasses import replace

import pytest
import torch

from dlrm.artifacts import sha256_of
from dlrm.config import Config, DataConfig, OutputConfig
from dlrm.errors import RunDirectoryError
from dlrm.recipes import RECIPES
from dlrm.runtime import Runtime
from dlrm.train import run_directory
from dlrm.train.run_directory import RunDirectory, describe_environment, describe_software, device_name

RUNTIME = Runtime(3, 1, 4, 2, torch.device("cpu"))


def config_at(path) -> Config:
    return Config(output=OutputConfig(run_dir=str(path)))


def test_check_makes_nothing(tmp_path):
    path = tmp_path / "several" / "levels" / "down"
    assert RunDirectory.check(config_at(path)) == path
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
    assert re.fullmatch(rf"runs/\d{{8}}-\d{{6}}-{name}", str(RunDirectory.check(config)))


def test_a_folder_that_holds_a_run(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert RunDirectory.check(config_at(tmp_path)) == tmp_path
    (tmp_path / "config.json").touch()
    with pytest.raises(RunDirectoryError, match=f"--run_dir {tmp_path}: holds a run already"):
        RunDirectory.check(config_at(tmp_path))


@pytest.mark.parametrize("below", ["", "run", "several/levels"])
def test_a_file_in_the_folders_place(below, tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / below
    with pytest.raises(RunDirectoryError, match=f"--run_dir {path}: {tmp_path / 'file'} is not a folder"):
        RunDirectory.check(config_at(path))
    with pytest.raises(RunDirectoryError, match=rf"{path}: can't be written \(.+\). Choose another --run_dir"):
        RunDirectory.create(path, Config(), {}, {})


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory.os, "access", lambda path, _: path != tmp_path)
    with pytest.raises(RunDirectoryError, match=f"no permission to write in {tmp_path}"):
        RunDirectory.check(config_at(tmp_path / "run"))


def test_create_writes_what_the_run_is(tmp_path):
    path = tmp_path / "runs" / "first"
    config = replace(RECIPES["mlperf_v2"](), output=OutputConfig(run_dir=str(path)))
    directory = RunDirectory.create(path, config, {"host": "here"}, {"tables": [1]})
    assert directory.path == path
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "environment.json", "plan.json"]
    assert Config.load(path / "config.json") == config
    assert json.loads((path / "environment.json").read_text()) == {"host": "here"}
    assert json.loads((path / "plan.json").read_text()) == {"tables": [1]}
    with pytest.raises(RunDirectoryError, match="holds a run already"):
        RunDirectory.check(config)


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
    environment = describe_environment(RUNTIME, Config())
    assert (environment["world_size"], environment["local_world_size"]) == (4, 2)
    assert environment["device"] == device_name(RUNTIME.device) == "cpu"
    assert environment["threads_per_rank"] == torch.get_num_threads()
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert environment["versions"]["torchrec"] == importlib.metadata.version("torchrec")
    assert environment["data_manifest_sha256"] is None
    assert json.loads(json.dumps(environment)) == environment


def test_environment_identifies_the_data(tmp_path):
    config = Config(data=DataConfig(in_memory_binary_criteo_path=str(tmp_path)))
    assert describe_environment(RUNTIME, config)["data_manifest_sha256"] is None
    (tmp_path / "manifest.json").write_text("{}")
    digest = describe_environment(RUNTIME, config)["data_manifest_sha256"]
    assert digest == sha256_of(tmp_path / "manifest.json")


def test_commit(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    module = tmp_path / "dlrm" / "run_directory.py"
    module.parent.mkdir()
    module.touch()
    monkeypatch.setattr(run_directory, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert describe_software()["commit"] is None
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert describe_software()["commit"] == head
    module.write_text("changed")
    assert describe_software()["commit"] == f"{head}-dirty"
