"""How far a long task is: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 2.0
_SECONDS_TO_FIRST_SIGN = 5.0
_SECONDS_BETWEEN_SIGNS = 60.0
_UNITS = (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30))
_LARGE = 1_000_000
"""From here on a bar shows 1.00M in place of all digits."""


_STDOUT, _STDERR = 1, 2
_result: TextIO | None = None
"""Standard output, while only the result may go there."""


def is_stdout(path: str | Path) -> bool:
    """Whether a file's name stands for standard output."""
    return str(path) in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@contextmanager
def result_alone(path: str | Path | None) -> Iterator[None]:
    """If `path` stands for standard output, only the result goes there: what is printed meanwhile goes to stderr."""
    global _result
    if path is None or not is_stdout(path):
        yield
        return
    stdout, has_file = sys.stdout, _is_file(sys.stdout, _STDOUT)
    stdout.flush()
    # Not only Python's stdout is turned, since the processes that are started print too.
    _result = os.fdopen(os.dup(_STDOUT), "w", encoding="utf-8") if has_file else stdout
    if has_file:
        os.dup2(_STDERR, _STDOUT)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        if has_file:
            os.dup2(_result.fileno(), _STDOUT)
            _result.close()
        sys.stdout, _result = stdout, None


def _is_file(stream: TextIO, number: int) -> bool:
    """Whether a stream is that open file of this process: in tests and notebooks it is not."""
    try:
        return stream.fileno() == number
    except OSError:
        return False


def print_result(text: str) -> None:
    """Prints a result to standard output, whatever else is printed where."""
    print(text, file=_result or sys.stdout, flush=True)


class Progress:
    """Counts up to `total` with rate, time left, and a note.

    On a terminal it is a bar; elsewhere a line every two seconds, and one at the end of what took longer than that or
    has a note.
    """

    def __init__(self, label: str, total: int, unit: str, shown: bool = True, done: int = 0) -> None:
        """Shows nothing yet. `done` of the total were done before, and don't count for the rate."""
        self._label = label
        self._total = total
        self._unit = unit
        self._shown = shown
        self._done = self._done_before = done
        self._note = ""
        self._passes: set[str] = set()
        self._lock = threading.Lock()
        self._started = self._printed = time.monotonic()
        self._bar = (
            tqdm(
                total=total,
                initial=done,
                desc=label,
                unit=f" {unit}",
                unit_scale=total >= _LARGE,
                dynamic_ncols=True,
            )
            if shown and _has_bars()
            else None
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` stands beside until the next one. From any thread."""
        with self._lock:
            self._done += count
            self._note = note or self._note
            if self._bar is not None:
                self._bar.update(count)
                if note:
                    self._bar.set_postfix_str(note)
            elif self._shown and self._is_due():
                self._printed = time.monotonic()
                print(self._line(), flush=True)

    def begin_pass(self, name: str, count: int) -> None:
        """Another pass over something: all but the first are work on top of the total."""
        with self._lock:
            if name in self._passes:
                self._total += count
                if self._bar is not None:
                    self._bar.total = self._total
            self._passes.add(name)

    def _is_due(self) -> bool:
        if self._done == self._total and self._note:
            return True
        return time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        done = self._done - self._done_before
        left = seconds / max(1, done) * max(0, self._total - self._done)
        note = self._note or f"{done / seconds:,.0f} {self._unit}/s"
        return f"{self._label}: {self._done:,}/{self._total:,} {self._unit} | {_clock(left)} left | {note}"

    def pause(self, seconds: float) -> None:
        """Leaves time spent on something else out of rate and time left."""
        self._started += seconds
        if self._bar is not None:
            self._bar.start_t += seconds

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()

    def print(self, text: str) -> None:
        """Prints a line without spoiling the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


@contextmanager
def signs_of_life(what: str) -> Iterator[None]:
    """Says on stderr that `what` still runs, if nobody can tell how far it is: after seconds, then ever less often."""
    over = threading.Event()
    started = time.monotonic()

    def say() -> None:
        pause = _SECONDS_TO_FIRST_SIGN
        while not over.wait(pause):
            print(f"{what}: {_clock(time.monotonic() - started)} so far", file=sys.stderr, flush=True)
            pause = min(2 * pause, _SECONDS_BETWEEN_SIGNS)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _has_bars() -> bool:
    """Whether stderr is a terminal that is wide enough for anything; some say that they have no columns."""
    return sys.stderr is not None and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def print_line(text: str) -> None:
    """Prints a line without spoiling any bar that is up."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def plural(number: int, noun: str) -> str:
    """The number and its noun."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def some(names: Sequence[str], most: int = 4) -> str:
    """The names, or the first ones and how many more there are."""
    shown = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return ", ".join(shown)


def show_bytes(size: float) -> str:
    """A size in the unit that leaves a number from 1 on before the point."""
    if size < 2**10:
        return f"{size:.0f} B"
    unit, scale = next((one for one in _UNITS if size < 2**10 * one[1]), _UNITS[-1])
    return f"{size / scale:,.1f} {unit}"


def align(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Cells in columns, those of the columns `right` flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def printable(text: str) -> str:
    """The text of a file that may be anybody's, without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)
