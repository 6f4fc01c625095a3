"""What a run does with its flags, seen from outside."""

import json
from pathlib import Path

import pytest

from dlrm.config.config import Config
from tests.distributed.test_faults import write_days
from tests.launching import TINY, read_metrics, read_summary, run_main


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "days"
    write_days(folder, (100, 60, 41))
    return str(folder)


def run_to(run_dir: Path, *flags: str) -> str:
    done = run_main(*TINY, *flags, "--run_dir", str(run_dir))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_validations_within_and_after_each_epoch(tmp_path: Path, days: str) -> None:
    flags = ["--batch_size", "16", "--epochs", "2", "--validation_freq_within_epoch", "4", "--print_lr"]
    output = run_to(tmp_path / "run", "--in_memory_binary_criteo_path", days, *flags)
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "val"] == [4, 8, 10, 14, 18, 20]
    summary = read_summary(tmp_path / "run")
    for metric in ("auroc", "logloss", "ne", "calibration"):
        assert summary[f"val_{metric}"] == [line[metric] for line in lines if line["kind"] == "val"]
    assert len(summary["val_auroc"]) == 6
    assert (summary["num_train_steps"], summary["num_train_samples"], summary["num_test_samples"]) == (20, 320, 20)
    assert output.count("lr: ") == 2 * 20
    assert "lr: 0 tables 0.100000\nlr: 0 dense 0.100000\n" in output


def test_config_json_loads_back_equal(tmp_path: Path, days: str) -> None:
    flags = ["--in_memory_binary_criteo_path", days, "--batch_size", "50", "--shuffle_batches", "--mmap_mode"]
    run_to(tmp_path / "run", *flags)
    config = Config.load(tmp_path / "run" / "config.json")
    assert config.data.in_memory_binary_criteo_path == days
    assert config.data.shuffle_batches
    assert config.training.seed is not None
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_target_stops_the_run_and_says_after_what(tmp_path: Path) -> None:
    write_days(tmp_path / "days", (4000, 200))
    flags = [
        "--in_memory_binary_criteo_path",
        str(tmp_path / "days"),
        "--seed",
        "1",
        "--adagrad",
        "--learning_rate",
        "0.005",
    ]
    flags += ["--validation_freq_within_epoch", "20", "--validation_auroc", "0.85"]
    output = run_to(tmp_path / "run", *flags)
    summary = read_summary(tmp_path / "run")
    assert summary["target_reached"] is True
    assert summary["val_auroc"][-1] >= 0.85 > summary["val_auroc"][-2]
    assert summary["num_train_samples"] < 4000
    assert f"reached the target 0.85 after {summary['num_train_samples']:,} samples and" in output
    assert "AUROC over test set" in output


def test_what_is_switched_off_does_not_happen(tmp_path: Path, days: str) -> None:
    flags = ["--no_evaluate_on_epoch_end", "--no_evaluate_on_training_end", "--drop_last_training_batch"]
    output = run_to(tmp_path / "run", "--in_memory_binary_criteo_path", days, "--batch_size", "32", *flags)
    assert "AUROC over" not in output
    summary = read_summary(tmp_path / "run")
    assert (summary["val_auroc"], summary["test_auroc"], summary["num_train_samples"]) == ([], None, 160)


def test_a_diverging_run_stops_with_the_step_and_a_remedy(tmp_path: Path) -> None:
    done = run_main(*TINY, "--learning_rate", "1e30", "--run_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "at step" in done.stderr
    assert "--learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_progress_shows_rate_time_left_loss_rate_and_auroc(tmp_path: Path) -> None:
    done = run_main(
        *TINY, "--print_progress", "--validation_freq_within_epoch", "5", "--run_dir", str(tmp_path / "run")
    )
    last = next(line for line in done.stdout.splitlines() if line.startswith("Epoch 0: 10/10 steps"))
    for word in ("left", "samples/s", "loss", "lr 0.1", "val AUROC 0."):
        assert word in last


def test_the_plan_is_printed_and_saved(tmp_path: Path) -> None:
    output = run_to(tmp_path / "run", "--print_sharding_plan")
    saved = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [table["table"] for table in saved["tables"]] == [f"t_cat_{i}" for i in range(26)]
    assert all(f"\n{table['table']} " in output for table in saved["tables"])


def test_criteo_kaggle_reads_one_file_in_time_order(tmp_path: Path) -> None:
    write_days(tmp_path / "days", (70, 70))
    for path in (tmp_path / "days").glob("day_0_*"):
        path.rename(path.with_name(path.name.replace("day_0", "train")))
    flags = ["--in_memory_binary_criteo_path", str(tmp_path / "days"), "--dataset_name", "criteo_kaggle"]
    run_to(tmp_path / "run", *flags)
    summary = read_summary(tmp_path / "run")
    assert (summary["num_train_samples"], summary["num_test_samples"]) == (60, 5)
