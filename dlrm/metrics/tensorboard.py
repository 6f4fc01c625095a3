"""Metrics as TensorBoard shows them. Importing this loads TensorBoard, which only a run with --tensorboard does."""

import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[missing-module-attribute] # protobuf makes it
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[missing-module-attribute]
from tensorboard.summary.writer.record_writer import RecordWriter

from dlrm.metrics.sinks import reported

_FILE_VERSION = "brain.Event:2"


class TensorBoardSink:
    """Draws the numbers of each line over the training step: `train/loss`, `val/auroc` and so on.

    A float is drawn, unless it is time; counts, and metrics that are undefined, are not. Lines are written at once:
    torch's SummaryWriter leaves that to a thread, which shows a full disk as a traceback of its own.

    Raises:
        RunDirectoryError: if the disk is full or the folder is gone.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{platform.node()}"
        reported(folder, lambda: folder.mkdir(exist_ok=True))
        self._append(Event(wall_time=time.time(), file_version=_FILE_VERSION))

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """One line."""
        values = [
            Summary.Value(tag=f"{line['kind']}/{name}", simple_value=value)
            for name, value in line.items()
            if isinstance(value, float) and name != "elapsed_seconds"
        ]
        if values:
            self._append(Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        def write() -> None:
            with self._path.open("ab") as file:
                RecordWriter(file).write(event.SerializeToString())

        reported(self._path.parent, write)
