"""MLPerf's DLRM v2 from planted logs to its target: recipe, multi-hot days, MLPerf's log, at reduced table sizes."""

import json
from pathlib import Path

import pytest

from tests.launching import BIN, read_summary, run, run_main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    for command in (
        ["synthesize", str(root / "raw"), "--rows", "30000", "--days", "3"],
        ["preprocess", *(str(root / f"raw/day_{day}.tsv") for day in range(3)), "--output", str(root / "days")],
        ["materialize", str(root / "days"), "--output", str(root / "multi_hot")],
    ):
        done = run([str(BIN / "dlrm"), *command])
        assert done.returncode == 0, done.stderr
    return root


def test_it_stops_at_the_target_and_says_so(folder: Path, tmp_path: Path) -> None:
    columns = json.loads((folder / "days/manifest.json").read_text())["columns"]
    flags = {
        "recipe": "mlperf_v2",
        "in_memory_binary_criteo_path": folder / "days",
        "synthetic_multi_hot_criteo_path": folder / "multi_hot",
        "num_embeddings_per_feature": ",".join(str(column["rows"]) for column in columns.values()),
        "batch_size": 64,
        "test_batch_size": 512,
        "validation_freq_within_epoch": 10,
        "limit_val_batches": 2,
        "limit_test_batches": 1,
        "validation_auroc": 0.52,
        "limit_train_batches": 100,
        "seed": 1,
        "run_dir": tmp_path / "run",
    }
    argv = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    done = run_main(*argv, "--mlperf_log", "--no_print_progress", ranks=2, timeout=800)
    assert done.returncode == 0, done.stderr
    summary = read_summary(tmp_path / "run")
    assert summary["target_reached"]
    assert summary["val_auroc"][-1] >= 0.52 > max([0.0, *summary["val_auroc"][:-1]])
    assert summary["num_train_samples"] == 10 * 128 * len(summary["val_auroc"]) < 100 * 128
    lines = [json.loads(line.removeprefix(":::MLLOG ")) for line in done.stdout.splitlines() if ":::MLLOG" in line]
    values = {line["key"]: line["value"] for line in lines}
    assert (values["submission_benchmark"], values["opt_name"]) == ("dlrm_dcnv2", "adagrad")
    assert values["global_batch_size"] == 128
    assert values["eval_accuracy"] == summary["val_auroc"][-1]
    assert lines[-1]["key"] == "run_stop"
    assert lines[-1]["metadata"]["status"] == "success"
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert sum(config["data"]["multi_hot_sizes"]) == 214
