"""Signals that end a process: a request to save first while there is a training, an exception everywhere else."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SECONDS_OF_ONE_SIGNAL = 1.0
_URGENT = (signal.SIGTERM, signal.SIGINT)
_OTHERS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""A terminal that is gone, Ctrl-\\, what schedulers send before a job's time is over, and a limit on CPU time."""

Receive = Callable[[int, FrameType | None], object]


class Ended(BaseException):
    """A signal has ended a program that has nothing to save. What is open is closed on the way out."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class InterruptedRun(KeyboardInterrupt):
    """SIGINT has ended a run, and the user was told so."""


class StopSignals:
    """Signals as a request to save and end. A second SIGTERM or SIGINT, a second or more later, ends at once.

    Launchers pass on what the terminal has already sent to all: two in the same second are one. A scheduler's SIGTERM
    after its SIGUSR1 is not a second one. With nothing to save the first one raises Ended.
    """

    def __init__(self, *, ends_process: bool = True) -> None:
        """Listens to nothing yet.

        Args:
            ends_process: whether the second signal may end the process, or raises Ended.
        """
        self.received: signal.Signals | None = None
        self._ends_process = ends_process
        self._can_save = False
        self._urgent_since: float | None = None

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Listens, if this is the main thread. What is ignored, as SIGHUP is under nohup, stays ignored."""
        others = [number for number in _OTHERS if signal.getsignal(number) is not signal.SIG_IGN]
        with _handled_by(self._receive, (*_URGENT, *others)):
            yield self

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While there is a training to save, and somebody who looks at `received`."""
        self._can_save = True
        try:
            yield
        finally:
            self._can_save = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        name, now = signal.Signals(number), time.monotonic()
        is_first, is_first_urgent = self.received is None, name in _URGENT and self._urgent_since is None
        self.received = self.received or name
        self._urgent_since = now if is_first_urgent else self._urgent_since
        if is_first and not self._can_save:
            say(f"{name.name}: ended, nothing saved")
            raise Ended(name)
        if is_first or is_first_urgent:
            say(f"{name.name}: saving a checkpoint, then ending." + is_first_urgent * " Send it again to end at once.")
        elif name in _URGENT and now - (self._urgent_since or now) >= _SECONDS_OF_ONE_SIGNAL:
            say(f"{name.name} again: ended")
            if self._ends_process:
                os._exit(exit_code(name))
            raise Ended(name)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Has signals that would end this process raise Ended, so that what is half-written goes. SIGINT stays as it is."""
    since: float | None = None

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal since
        del frame
        is_again = since is not None and time.monotonic() - since >= _SECONDS_OF_ONE_SIGNAL
        if since is None or (number == signal.SIGTERM and is_again):
            since = time.monotonic()
            raise Ended(signal.Signals(number))

    numbers = (signal.SIGTERM, *_OTHERS)
    with _handled_by(receive, [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]):
        yield


@contextmanager
def _handled_by(receive: Receive, numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Has `receive` called for these signals, if this is the main thread: no other one may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python


def say(text: str) -> None:
    """Prints a line on stderr, on rank 0. Never fails: the terminal may be what has gone."""
    if os.environ.get("RANK", "0") != "0" or sys.stderr is None:
        return
    with suppress(OSError, ValueError):
        start = "\n" if sys.stderr.isatty() else ""  # there may be a bar on the line
        line = f"{start}dlrm: {text}\n"
        try:
            number = sys.stderr.fileno()
        except OSError:  # in a notebook
            sys.stderr.write(line)
        else:
            os.write(number, line.encode(errors="backslashreplace"))


def exit_code(number: signal.Signals) -> int:
    """The exit code by which shells and schedulers know that a process was ended by this signal."""
    return 128 + number
