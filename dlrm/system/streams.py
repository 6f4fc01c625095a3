"""Standard streams that take any text, and whose loss does not end what the program does."""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from dlrm.errors import reason_of

_STDOUT, _STDERR = 1, 2


class Stream(io.RawIOBase):
    """A standard stream that is given up once it can't be written: the disk is full, or the terminal has gone.

    Attributes:
        is_optional: whether it is given up as well if its reader has gone, as in `... | head`, which else raises.
        lost: why it was given up; None while it is fine.
    """

    def __init__(self, number: int) -> None:
        """Writes to the descriptor `number`, and leaves it open."""
        super().__init__()
        self._number = number
        self.is_optional = number == _STDERR
        self.lost: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._number

    def isatty(self) -> bool:
        """Whether it is a terminal that is still there."""
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        """Takes bytes. Once it is given up they go nowhere."""
        while self.lost is None:
            try:
                return os.write(self._number, data)
            except BlockingIOError:
                select.select([], [self._number], [])
            except OSError as error:
                if isinstance(error, BrokenPipeError) and not self.is_optional:
                    raise
                self._give_up(error)
        return len(data)

    def _give_up(self, error: OSError) -> None:
        self.lost = error
        if self._number == _STDOUT:
            print(f"dlrm: stdout can't be written ({reason_of(error)}). What follows is not shown.", file=sys.stderr)


@contextmanager
def safe_streams() -> Iterator[Stream | None]:
    """Has stdout and stderr take any text, whatever the terminal's encoding, and survive the loss of what they lead to.

    What a terminal can't show is printed as \\xe4 or \\udce9. A stream that somebody has put in place of the process's
    own, as a notebook has, is left alone.

    Yields:
        stdout; None if it was left alone.
    """
    _fill_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _open(sys.stdout, _STDOUT), _open(sys.stderr, _STDERR)
    try:
        yield raw if isinstance(raw := _raw_of(sys.stdout), Stream) else None
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def make_stdout_optional() -> None:
    """Has the program continue without stdout, even if its reader has gone: its results are elsewhere."""
    if isinstance(raw := _raw_of(sys.stdout), Stream):
        raw.is_optional = True


def _fill_descriptors() -> None:
    """Opens what was closed at the start (`>&-`), so that no file of ours becomes the stdout of a library."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(number, True)
    os.close(number)


def _open(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    raw = _raw_of(stream)
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO) or raw.fileno() != number:
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Stream(number)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=bool(stream.line_buffering) or number == _STDERR,
        write_through=stream.write_through,
    )


def _raw_of(stream: TextIO) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)  # under PYTHONUNBUFFERED there is nothing in between
