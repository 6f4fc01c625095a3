"""Lines of metrics as MLPerf's lines. The whole log is checked in tests/integration/test_logs.py."""

import io
import json
import logging
from dataclasses import replace

import pytest
from mlperf_logging.mllog.mllog import MLLogger

from dlrm.config.config import Config, OptimizerConfig
from dlrm.config.recipes import RECIPES
from dlrm.errors import RunDirectoryError
from dlrm.metrics.mlperf import MlperfLog, describe_optimizer, describe_run

FACTS = {"train_samples": 1000, "seed": 3}


def line_at(kind, num_train_samples, **fields):
    return {"kind": kind, "num_train_samples": num_train_samples, **fields}


def read_events(path, since="run_start"):
    """Key, value and metadata of the lines after the first with the key `since`."""
    lines = [json.loads(line.removeprefix(":::MLLOG ")) for line in path.read_text().splitlines()]
    start = [line["key"] for line in lines].index(since)
    metadata = [{k: v for k, v in line["metadata"].items() if k not in ("file", "lineno")} for line in lines]
    return [(line["key"], line["value"], where) for line, where in zip(lines, metadata, strict=True)][start + 1 :]


def test_a_run_becomes_its_events(tmp_path, capsys):
    log = MlperfLog(tmp_path / "log.txt", FACTS, 1.5, 2.25)
    for line in [
        line_at("epoch_start", 1000, epoch=1),
        line_at("train", 1200, loss=0.5),
        line_at("val_start", 1250),
        line_at("val", 1250, auroc=0.75),
        line_at("val_start", 1500),
        line_at("val", 1500, auroc=None),
        line_at("epoch_stop", 2000, epoch=1),
        line_at("train_stop", 2000, reached_target=True),
        line_at("test_start", 2000),
        line_at("test", 2000, auroc=0.5),
    ]:
        log.append_metrics(line)
    log.close()
    quarter, half, end = ({"epoch_num": n / 1000, "samples_count": n} for n in (1250, 1500, 2000))
    assert read_events(tmp_path / "log.txt") == [
        ("epoch_start", None, {"epoch_num": 1, "samples_count": 1000}),
        ("eval_start", None, quarter),
        ("eval_accuracy", 0.75, quarter),
        ("eval_stop", None, quarter),
        ("eval_start", None, half),
        ("eval_stop", None, half),
        ("epoch_stop", None, {"epoch_num": 1, "samples_count": 2000}),
        ("run_stop", None, {"status": "success", **end}),
    ]
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text()


def test_init_and_run_start_when_process_and_data_did(tmp_path):
    MlperfLog(tmp_path / "log.txt", FACTS, 1.5, 2.25)
    lines = [json.loads(line.removeprefix(":::MLLOG ")) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [(line["key"], line["time_ms"], line["event_type"]) for line in lines] == [
        ("cache_clear", 1500, "POINT_IN_TIME"),
        ("init_start", 1500, "INTERVAL_START"),
        ("train_samples", 2250, "POINT_IN_TIME"),
        ("seed", 2250, "POINT_IN_TIME"),
        ("init_stop", 2250, "INTERVAL_END"),
        ("run_start", 2250, "INTERVAL_START"),
    ]


@pytest.mark.parametrize("end", [[], [line_at("train_stop", 10, reached_target=False)]])
def test_a_run_without_success_is_aborted_once(end, tmp_path):
    log = MlperfLog(tmp_path / "log.txt", FACTS, 1.0, 2.0)
    for line in [line_at("train", 10), *end]:
        log.append_metrics(line)
    log.close()
    where = {"epoch_num": 0.01, "samples_count": 10}
    assert read_events(tmp_path / "log.txt") == [("run_stop", None, {"status": "aborted", **where})]


def test_a_line_has_the_form_of_mllogs_own(tmp_path):
    stream = io.StringIO()
    logger = logging.Logger("mllog")
    logger.addHandler(logging.StreamHandler(stream))
    MLLogger(logger).event("cache_clear", False)
    MlperfLog(tmp_path / "log.txt", FACTS, 1.0, 2.0)
    ours = (tmp_path / "log.txt").read_text().splitlines()[0]
    token, theirs = stream.getvalue().split(" ", 1)
    assert ours.startswith(token + " ")
    theirs, ours = json.loads(theirs), json.loads(ours.removeprefix(token))
    assert list(ours) == list(theirs)
    assert list(ours["metadata"]) == list(theirs["metadata"])
    assert [ours[key] for key in ("event_type", "key", "value")] == [
        theirs[key] for key in ("event_type", "key", "value")
    ]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (OptimizerConfig(learning_rate=2.0), {"opt_name": "sgd", "opt_base_learning_rate": 2.0, "opt_weight_decay": 0}),
        (
            OptimizerConfig(adagrad=True, learning_rate=0.5, eps=1e-6),
            {
                "opt_name": "adagrad",
                "opt_base_learning_rate": 0.5,
                "opt_weight_decay": 0,
                "opt_adagrad_epsilon": 1e-6,
                "opt_adagrad_initial_accumulator_value": 0,
                "opt_adagrad_learning_rate_decay": 0,
            },
        ),
    ],
)
def test_the_optimizer(optimizer, expected):
    assert describe_optimizer(optimizer) == expected


def test_the_v2_recipe_has_the_global_batch_of_its_rules():
    facts = describe_run(RECIPES["mlperf_v2"](), "NVIDIA A100", 8, 4_195_197_692, 89_137_319)
    assert (facts["global_batch_size"], facts["opt_base_learning_rate"]) == (65_536, 0.004)
    assert (facts["train_samples"], facts["eval_samples"]) == (4_195_197_692, 89_137_319)
    assert facts["submission_platform"] == "8x NVIDIA A100"


def test_the_schedule():
    optimizer = OptimizerConfig(lr_warmup_steps=3, lr_decay_start=5, lr_decay_steps=7)
    facts = describe_run(replace(Config(), optimizer=optimizer), "cpu", 1, 10, 10)
    names = ("warmup_steps", "decay_start_step", "decay_steps")
    assert [facts[f"opt_learning_rate_{name}"] for name in names] == [3, 5, 7]


def test_a_folder_that_is_gone(tmp_path):
    path = tmp_path / "gone" / "log.txt"
    with pytest.raises(RunDirectoryError, match=rf"{path}: can't be written \(No such file or directory\)"):
        MlperfLog(path, FACTS, 1.0, 2.0)


def test_a_full_disk(tmp_path):
    path = tmp_path / "log.txt"
    path.symlink_to("/dev/full")
    with pytest.raises(RunDirectoryError, match=rf"{path}: can't be written \(the disk is full\)"):
        MlperfLog(path, FACTS, 1.0, 2.0)
