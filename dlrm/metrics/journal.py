"""The lines of metrics.jsonl, as a training writes them."""

import time
from typing import Any

from dlrm.checkpoint.position import Position
from dlrm.metrics.sinks import Sink


class Journal:
    """Writes lines to a sink, each with the step, the samples and the seconds that training has come to."""

    def __init__(self, sink: Sink, seconds: float = 0.0) -> None:
        """Begins, or continues a training that has taken `seconds`."""
        self._sink = sink
        self._started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Since training began, validations included, and time before it was resumed."""
        return time.perf_counter() - self._started

    def write(self, kind: str, position: Position, **fields: Any) -> None:
        """Writes a line."""
        where = {"kind": kind, "step": position.step, "num_train_samples": position.num_samples}
        self._sink.append_metrics({**where, **fields, "elapsed_seconds": round(self.seconds, 3)})
