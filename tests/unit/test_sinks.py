"""Views of the lines of metrics.jsonl."""

import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dlrm.errors import RunDirectoryError
from dlrm.metrics.sinks import Sinks
from dlrm.metrics.tensorboard import TensorBoardSink

TRAIN = {"kind": "train", "step": 20, "epoch": 1, "num_train_samples": 640, "loss": 0.25, "elapsed_seconds": 1.5}
VAL = {"kind": "val", "step": 20, "auroc": None, "logloss": 0.5, "num_samples": 7, "elapsed_seconds": 2.5}
MARK = {"kind": "epoch_stop", "step": 20, "epoch": 1, "elapsed_seconds": 3.5}


class Lines:
    def __init__(self, name, lines):
        self.name, self.lines = name, lines

    def append_metrics(self, line):
        self.lines.append((self.name, line))


def test_each_sink_gets_each_line_in_order():
    lines = []
    sinks = Sinks([Lines("first", lines), Lines("second", lines)])
    sinks.append_metrics(TRAIN)
    sinks.append_metrics(VAL)
    assert lines == [("first", TRAIN), ("second", TRAIN), ("first", VAL), ("second", VAL)]
    Sinks([]).append_metrics(TRAIN)


def test_tensorboard_draws_numbers_that_are_defined_and_neither_counts_nor_time(tmp_path):
    sink = TensorBoardSink(tmp_path / "tensorboard")
    for line in (TRAIN, VAL, MARK, {**TRAIN, "step": 40, "loss": 0.125}):
        sink.append_metrics(line)
    assert read_scalars(tmp_path / "tensorboard") == {
        "train/loss": [(20, 0.25), (40, 0.125)],
        "val/logloss": [(20, 0.5)],
    }


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_in_a_folder_that_is_gone(tmp_path):
    folder = tmp_path / "tensorboard"
    sink = TensorBoardSink(folder)
    shutil.rmtree(folder)
    with pytest.raises(RunDirectoryError, match=rf"{folder}: can't be written \(No such file or directory\)"):
        sink.append_metrics(TRAIN)


def test_tensorboard_in_a_files_place(tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(RunDirectoryError, match=rf"{tmp_path / 'tensorboard'}: can't be written \(File exists\)"):
        TensorBoardSink(tmp_path / "tensorboard")
