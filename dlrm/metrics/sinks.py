"""Sinks take lines of metrics. metrics.jsonl keeps every line; other sinks draw their view from the same lines."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dlrm.errors import RunDirectoryError, reason_of

T = TypeVar("T")


class Sink(Protocol):
    """Takes in lines of metrics."""

    def append_metrics(self, line: dict[str, Any]) -> None:
        """One line."""
        ...


class Sinks:
    """Hands each line to several sinks, in order. All ranks but 0 have none."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    def append_metrics(self, line: dict[str, Any]) -> None:
        """One line."""
        for sink in self._sinks:
            sink.append_metrics(line)


def reported(path: Path, write: Callable[[], T]) -> T:
    """Calls `write`, which writes at or below `path`.

    Raises:
        RunDirectoryError: naming `path`, if the disk is full or the folder is gone.
    """
    try:
        return write()
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> RunDirectoryError:
    """The error for a folder that can't be written."""
    return RunDirectoryError(
        f"{path}: can't be written ({reason_of(error)}). Fix that and start the same command again, or choose another "
        "--run_dir."
    )
