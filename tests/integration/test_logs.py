"""--tensorboard and --mlperf_log of real runs: against metrics.jsonl, and against MLPerf's own compliance checker."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlperf_logging.compliance_checker.mlp_compliance import make_checker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.test_faults import write_days
from tests.launching import MAIN, ROOT, TINY, read_metrics, read_summary, run_main

RULES = "6.0.0"
TOKEN = ":::MLLOG "
ADAGRAD = ("--adagrad", "--learning_rate", "0.005")


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that reaches its target before the end of its epoch."""
    folder = tmp_path_factory.mktemp("reached")
    write_days(folder / "days", (4000, 200))
    flags = ["--in_memory_binary_criteo_path", str(folder / "days"), *ADAGRAD, "--seed", "1", "--batch_size", "16"]
    flags += ["--validation_freq_within_epoch", "20", "--validation_auroc", "0.85", "--tensorboard", "--mlperf_log"]
    done = run_main(*TINY, *flags, "--run_dir", str(folder / "run"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "run"


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(TOKEN)) for line in (run_dir / "mlperf_log.txt").read_text().splitlines()]


def find_faults(log: Path) -> dict[str, str]:
    """What MLPerf's checker objects to, by key."""
    checker = make_checker("training", RULES, quiet=False, werror=True)
    checker.check_file(str(log), f"training_{RULES}/common.yaml")
    return {**checker.overwritable, **{str(i): text for i, text in enumerate(checker.not_overwritable)}}


def test_tensorboard_shows_what_metrics_jsonl_says(reached: Path) -> None:
    events = EventAccumulator(str(reached / "tensorboard")).Reload()
    shown = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    measured = ("loss", "samples_per_second", "learning_rate", "dense_learning_rate")
    measured += ("auroc", "logloss", "ne", "calibration", "stall_seconds", "write_seconds")
    expected = {
        (f"{line['kind']}/{name}", line["step"]): line[name]
        for line in read_metrics(reached)
        for name in measured
        if name in line
    }
    assert shown == pytest.approx(expected, rel=1e-6)  # TensorBoard keeps float32
    assert len({step for tag, step in shown if tag == "val/auroc"}) == len(read_summary(reached)["val_auroc"]) > 2
    assert {tag.split("/")[0] for tag, _ in shown} == {"train", "val", "test", "checkpoint"}


def test_mlperfs_checker_accepts_the_log(reached: Path) -> None:
    assert find_faults(reached / "mlperf_log.txt") == {}


def test_in_the_closed_division_only_the_size_of_the_data_is_wrong(reached: Path, tmp_path: Path) -> None:
    text = (reached / "mlperf_log.txt").read_text()
    assert text.count('"value": "open"') == 1
    (tmp_path / "closed.txt").write_text(text.replace('"value": "open"', '"value": "closed"'))
    faults = find_faults(tmp_path / "closed.txt")
    assert list(faults) == ["eval_samples"]
    assert "v['value'] == 89137319" in faults["eval_samples"]


def test_rank_0_alone_prints_the_log_and_writes_the_same(reached: Path) -> None:
    printed = [line for line in (reached.parent / "stdout").read_text().splitlines() if TOKEN in line]
    assert printed == (reached / "mlperf_log.txt").read_text().splitlines()
    assert len(list((reached / "tensorboard").iterdir())) == 1


def test_events_come_in_order_of_time_and_end_with_success(reached: Path) -> None:
    lines, summary = read_log(reached), read_summary(reached)
    validations = len(summary["val_auroc"])
    points = ("cache_clear", "eval_accuracy")
    assert [x["key"] for x in lines if x["event_type"] != "POINT_IN_TIME" or x["key"] in points] == [
        *("cache_clear", "init_start", "init_stop", "run_start", "epoch_start"),
        *("eval_start", "eval_accuracy", "eval_stop") * validations,
        *("epoch_stop", "run_stop"),
    ]
    times = [line["time_ms"] for line in lines]
    assert times == sorted(times)
    assert [line["value"] for line in lines if line["key"] == "eval_accuracy"] == summary["val_auroc"]
    assert lines[-1]["metadata"]["status"] == "success"
    assert lines[-1]["metadata"]["samples_count"] == summary["num_train_samples"]
    assert lines[-1]["metadata"]["epoch_num"] == summary["num_train_samples"] / 4000
    facts = {line["key"]: line["value"] for line in lines}
    assert [facts[key] for key in ("global_batch_size", "train_samples", "eval_samples")] == [32, 4000, 100]


def test_a_target_that_is_missed_is_an_aborted_run(tmp_path: Path) -> None:
    flags = ["--validation_auroc", "0.99", "--epochs", "2", "--mlperf_log", "--run_dir", str(tmp_path / "run")]
    done = run_main(*TINY, *flags)
    assert done.returncode == 0, done.stderr
    lines = read_log(tmp_path / "run")
    assert [line["metadata"]["epoch_num"] for line in lines if line["key"] == "epoch_start"] == [0, 1]
    assert [line["metadata"]["epoch_num"] for line in lines if line["key"] == "eval_accuracy"] == [1, 2]
    assert lines[-1]["key"] == "run_stop"
    assert lines[-1]["metadata"]["status"] == "aborted"
    assert "AUROC over test set" in done.stdout
    assert "The target was not reached: --validation_auroc 0.99, the best validation has 0." in done.stdout
    assert find_faults(tmp_path / "run" / "mlperf_log.txt") == {}


def test_an_interrupted_run_is_aborted(tmp_path: Path) -> None:
    flags = [*TINY, "--validation_auroc", "0.99", "--limit_train_batches", "1000000", "--mlperf_log"]
    command = [sys.executable, MAIN, *flags, "--run_dir", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("epoch_start" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    last = read_log(tmp_path / "run")[-1]
    assert (last["key"], last["metadata"]["status"]) == ("run_stop", "aborted")


def test_a_diverging_run_is_aborted(tmp_path: Path) -> None:
    flags = ["--learning_rate", "1e30", "--validation_auroc", "0.99", "--mlperf_log", "--tensorboard"]
    done = run_main(*TINY, *flags, "--run_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr.startswith("dlrm: error: loss ")
    last = read_log(tmp_path / "run")[-1]
    assert (last["key"], last["metadata"]["status"]) == ("run_stop", "aborted")


def test_a_log_that_can_not_be_begun_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """The disk is full after the first event file and three lines."""
    flags = [*TINY, "--validation_auroc", "0.99", "--mlperf_log", "--tensorboard", "--run_dir", str(tmp_path / "run")]
    code = f"""
import dlrm_main
from dlrm.errors import RunDirectoryError
from dlrm.metrics.mlperf import MlperfLog

log, left = MlperfLog._log, [3]
def fail_later(self, *arguments, **named):
    left[0] -= 1
    if left[0] < 0:
        raise RunDirectoryError("no space left")
    log(self, *arguments, **named)
MlperfLog._log = fail_later
dlrm_main.main({flags!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "dlrm: error: no space left\n")
    assert done.stdout.count(TOKEN) == 3
    assert list((tmp_path / "run").iterdir()) == []
    done = run_main(*TINY, "--tensorboard", "--run_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "tensorboard").is_dir()


def test_without_the_flags_neither_is_loaded_or_written(tmp_path: Path) -> None:
    flags = [*TINY, "--run_dir", str(tmp_path / "run")]
    code = f"import sys, dlrm_main; dlrm_main.main({flags!r}); print('tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert TOKEN not in done.stdout
    assert not {"tensorboard", "mlperf_log.txt"} & {path.name for path in (tmp_path / "run").iterdir()}
