import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dlrm.cli import main
from dlrm.config.config import Config, DataConfig, OptimizerConfig, OutputConfig
from tests.unit.checkpoint_folders import write_checkpoint

USER_ERROR = 2
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"}, "commit": COMMIT, "host": "here", "device": "cpu",
    "launch": "here 1 2", "world_size": 1, "data_fingerprint": "ab" * 32,
}  # fmt: skip
LINES = [
    {"kind": "epoch_start", "step": 0, "num_train_samples": 0, "elapsed_seconds": 0.0},
    {"kind": "train", "step": 10, "num_train_samples": 1000, "samples_per_second": 500.0, "elapsed_seconds": 2.5},
    {"kind": "val", "step": 10, "num_train_samples": 1000, "auroc": 0.7, "logloss": 0.5, "ne": 0.9, "calibration": 1.0,
     "elapsed_seconds": 3.0},
    {"kind": "train", "step": 20, "num_train_samples": 3000, "samples_per_second": 1000.0, "elapsed_seconds": 5.5},
    {"kind": "val", "step": 20, "num_train_samples": 3000, "auroc": 0.6, "logloss": 0.6, "ne": 1.0, "calibration": 1.1,
     "elapsed_seconds": 6.0},
]  # fmt: skip
SUMMARY = {
    "val_auroc": [0.7, 0.8], "val_logloss": [0.5, 0.4], "val_ne": [0.9, 0.8], "val_calibration": [1.0, 1.0],
    "test_auroc": 0.79, "test_logloss": 0.41, "test_ne": 0.81, "test_calibration": 0.99, "num_train_samples": 6000,
    "num_train_steps": 60, "train_seconds": 3.0, "total_seconds": 4.0, "samples_per_second": 2000.0,
    "peak_memory_gib": 1.5, "finished": "2026-11-23T10:00:00+0000",
}  # fmt: skip


def table(name: str, sharding: str, ranks: list[int]) -> dict:
    return {"table": name, "sharding": sharding, "kernel": "fused", "ranks": ranks}


def write_run(
    folder: Path,
    config: Config,
    *,
    environment: dict = ENVIRONMENT,
    sharding: str = "table_wise",
    finished: bool = True,
) -> str:
    folder.mkdir(parents=True)
    ranks = [0] if sharding == "table_wise" else [0, 1]
    plan = {"tables": [*(table(f"t_cat_{i}", sharding, ranks) for i in range(5)), table("t_cat_5", "row_wise", [0])]}
    documents = {"config.json": config.to_json(), "environment.json": environment, "plan.json": plan}
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    if finished:
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return str(folder)


def compare(capsys, one: str, other: str) -> dict:
    assert main(["compare", one, other, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def shown(capsys, one: str, other: str) -> list[str]:
    assert main(["compare", one, other]) == 0
    return capsys.readouterr().out.splitlines()


def cells(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.startswith(f"{name}  ")]
    return line.removeprefix(name).split()


@pytest.fixture
def runs(tmp_path) -> tuple[str, str]:
    """A finished run, and another one that is not."""
    other = {
        **ENVIRONMENT, "versions": {"python": "3.11.7", "torch": "2.11.0"}, "commit": f"{COMMIT}-dirty",
        "data_fingerprint": "ab" * 31 + "cd", "world_size": 2, "launch": "here 3 4",
    }  # fmt: skip
    changed = Config(data=DataConfig(batch_size=64), optimizer=OptimizerConfig(adagrad=True))
    return (
        write_run(tmp_path / "first run", Config()),
        write_run(tmp_path / "zweiter Läuf", changed, environment=other, sharding="row_wise", finished=False),
    )


def test_what_differs(runs, capsys):
    facts = compare(capsys, *runs)
    assert facts["runs"] == [
        {"address": runs[0], "state": "finished 2026-11-23T10:00:00+0000"},
        {"address": runs[1], "state": "not finished, up to step 20"},
    ]
    assert facts["config"]["differing"] == {"batch_size": [32, 64], "adagrad": [False, True]}
    assert facts["config"]["agreeing"] > 60
    assert facts["environment"]["differing"] == {
        "commit": [COMMIT, f"{COMMIT}-dirty"],
        "world_size": [1, 2],
        "data_fingerprint": ["ab" * 32, "ab" * 31 + "cd"],
        "torch": ["2.13.0", "2.11.0"],
    }
    assert facts["environment"]["agreeing"] == 3
    moved = ["table_wise fused, rank 0", "row_wise fused, ranks 0,1"]
    assert facts["plan"] == {"agreeing": 1, "differing": {f"t_cat_{i}": moved for i in range(5)}}


def test_metrics_side_by_side(runs, capsys):
    metrics = compare(capsys, *runs)["metrics"]
    assert metrics["val_auroc"] == [0.8, 0.6]
    assert metrics["best_val_auroc"] == [0.8, 0.7]
    assert metrics["test_auroc"] == [0.79, None]
    assert metrics["num_train_samples"] == [6000, 3000]
    assert metrics["train_seconds"] == [3.0, 4.0]  # 1000 samples at 500/s, 2000 at 1000/s
    assert metrics["samples_per_second"] == [2000.0, 750.0]
    assert metrics["total_seconds"] == [4.0, 6.0]
    assert metrics["peak_memory_gib"] == [1.5, None]


def test_what_is_shown(runs, capsys):
    lines = shown(capsys, *runs)
    assert lines[0] == f"1  {runs[0]}: finished 2026-11-23T10:00:00+0000"
    assert lines[1] == f"2  {runs[1]}: not finished, up to step 20"
    assert cells(lines, "--batch_size") == ["32", "64"]
    assert cells(lines, "commit") == ["0123456789ab", "0123456789ab-dirty"]
    (total,) = [line for line in lines if line.startswith("config: ")]
    count = int(total.split()[3])
    assert total == f"config: {count - 2} of {count} fields agree"
    assert "environment: 3 of 7 facts agree" in lines
    assert "plan: 1 of 6 tables agree" in lines
    assert any(line.startswith("t_cat_0 and 4 more  table_wise fused, rank 0  row_wise") for line in lines)
    assert cells(lines, "val AUROC") == ["0.800000", "0.600000", "-0.200000"]
    assert cells(lines, "test NE") == ["0.810000", "-"]
    assert cells(lines, "samples/s") == ["2,000", "750", "-62.5%"]
    assert not any("host" in line for line in lines)


def test_a_run_and_itself(runs, capsys):
    facts = compare(capsys, runs[0], runs[0])
    assert [facts[kind]["differing"] for kind in ("config", "environment", "plan")] == [{}, {}, {}]
    assert cells(shown(capsys, runs[0], runs[0]), "val AUROC") == ["0.800000", "0.800000", "+0.000000"]


def test_a_checkpoint_counts_with_what_was_known_at_its_step(runs, tmp_path, capsys):
    config = Config(output=OutputConfig(run_dir="x"))
    path = write_checkpoint(tmp_path / "checkpoints", 10, config=config, lines=LINES[:3], environment=ENVIRONMENT)
    for address in (str(path), str(tmp_path), f"file://{path}"):
        facts = compare(capsys, runs[0], address)
        assert facts["runs"][1]["state"] == "checkpoint of step 10, written 2026-11-23T10:00:00+0000"
        assert facts["metrics"]["val_auroc"] == [0.8, 0.7]
        assert facts["metrics"]["num_train_steps"] == [60, 10]
        assert facts["config"]["differing"] == {"run_dir": [None, "x"]}
        assert facts["environment"]["differing"] == {}
    (path / "config.json").write_text("{}")
    assert main(["compare", runs[0], str(path)]) == USER_ERROR
    assert "config.json has 2 bytes, expected" in capsys.readouterr().err


def test_runs_that_have_hardly_begun(runs, tmp_path, capsys):
    folder = Path(runs[1])
    (folder / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1])[:20])
    facts = compare(capsys, *runs)
    assert facts["runs"][1]["state"] == "not finished, up to step 0"
    assert facts["metrics"]["num_train_samples"] == [6000, 0]
    assert facts["metrics"]["samples_per_second"] == [2000.0, None]
    for name in ("metrics.jsonl", "plan.json", "environment.json"):
        (folder / name).unlink()
    assert compare(capsys, *runs)["runs"][1]["state"] == "not finished, no step yet"
    assert cells(shown(capsys, *runs), "val AUROC") == ["0.800000", "-"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", '{"config_version": 99}'),
        ("config.json", "\udcff"),
        ("environment.json", "[]"),
        ("plan.json", '{"tables": [{}]}'),
        ("metrics.jsonl", "{\n"),
        ("metrics.jsonl", '{"kind": "train"}\n'),
        ("summary.json", '{"val_auroc": ["high"]}'),
        ("summary.json", '{"finished": "", "val_auroc": ["high"]}'),
        ("summary.json", '{"finished": "", "train_seconds": 1' + "0" * 400 + "}"),
        ("metrics.jsonl", '{"kind": "val", "auroc": "high"}\n'),
    ],
)
def test_a_damaged_file_is_one_line(file, content, runs, capsys):
    if file == "metrics.jsonl":
        Path(runs[0], "summary.json").unlink()
    Path(runs[0], file).write_text(content, errors="surrogateescape")
    assert main(["compare", *runs]) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith("dlrm compare: error: ")
    assert f"{runs[0]}/{file}: " in captured.err
    assert captured.err.count("\n") == 1


def test_no_run_there(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for address in ("gone", "empty"):
        assert main(["compare", runs[0], str(tmp_path / address)]) == USER_ERROR
        assert str(tmp_path / address) in capsys.readouterr().err


def test_no_torch(runs):
    code = (
        f"import sys\nfrom dlrm.cli import main\nassert main(['compare', *{runs!r}, '--json']) == 0\n"
        "print({'torch', 'torchrec', 'fbgemm_gpu', 'numba'} & set(sys.modules), file=sys.stderr)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stderr == "set()\n"


def test_a_finished_run_of_fewer_metrics(runs, capsys):
    Path(runs[0], "summary.json").write_text(json.dumps({"finished": "then", "val_auroc": [None]}))
    assert compare(capsys, *runs)["metrics"]["val_auroc"] == [None, 0.6]


def test_flags_only_of_one_version(runs, capsys):
    path = Path(runs[0], "config.json")
    content = replace(Config()).to_json()
    del content["data"]["zipf_exponent"]
    path.write_text(json.dumps(content))
    assert "zipf_exponent" not in compare(capsys, *runs)["config"]["differing"]
