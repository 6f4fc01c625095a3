"""What ranks decide together: to save, to stop, to give up. And what a signal asks of a run."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist

from dlrm.runtime import Runtime, new_control_group

_SECONDS_BETWEEN = 0.05
_MOST_STEPS_BETWEEN = 100
_SECONDS_OF_ONE_SIGNAL = 1.0


class Wish(IntEnum):
    """What a rank wants; the strongest of all ranks' is done. INTERRUPT is SIGINT's, END is SIGTERM's."""

    GO_ON = 0
    SAVE = 1
    INTERRUPT = 2
    END = 3
    FAIL = 4


class Agreement:
    """The strongest wish of all ranks, known to all at the same step, some steps after it was made.

    Ranks exchange wishes about every 50 ms. An exchange is started at one of those steps and looked at in the next, so
    that no step waits for it.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._group = new_control_group(runtime.world_size)
        self._is_alone = runtime.world_size == 1
        self._sent = torch.zeros(2, dtype=torch.int64)
        self._work: dist.Work | None = None
        self._steps_left = 0
        self._steps_between = 1
        self._since = time.perf_counter()

    def reach(self, wish: Wish) -> Wish:
        """Call at every step. Collective. What is agreed on is not asked for again in the same breath."""
        if self._is_alone:
            return wish
        if self._steps_left:
            self._steps_left -= 1
            return Wish.GO_ON
        now = time.perf_counter()
        seconds_a_step = (now - self._since) / self._steps_between
        self._since = now
        agreed = Wish.GO_ON
        if self._work is not None:
            self._work.wait()
            agreed, self._steps_between = Wish(int(self._sent[0])), int(self._sent[1])
        steps = min(_MOST_STEPS_BETWEEN, max(1, int(_SECONDS_BETWEEN / max(seconds_a_step, 1e-9))))
        self._sent = torch.tensor([wish if wish > agreed else Wish.GO_ON, steps])
        self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._steps_left = self._steps_between - 1
        return agreed


class Ended(BaseException):
    """A signal has ended a run that has nothing to save. Logs are closed on the way out."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class StopSignals:
    """SIGTERM and SIGINT as a request to save and end. A second one, a second or more later, ends at once.

    Launchers pass on what the terminal has already sent to all: two in the same second are one. With nothing to save
    the first one raises Ended.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._can_save = False
        self._at = 0.0

    @contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Listens, if this is the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

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
        name = signal.Signals(number)
        if self.received is None and self._can_save:
            self.received, self._at = name, time.monotonic()
            self._say(f"{name.name}: saving a checkpoint, then ending. Send it again to end at once.")
            return
        if self.received is None:
            self.received, self._at = name, time.monotonic()
            self._say(f"{name.name}: ended, nothing saved")
            raise Ended(name)
        if time.monotonic() - self._at >= _SECONDS_OF_ONE_SIGNAL:
            self._say(f"{name.name} again: ended")
            os._exit(exit_code(name))

    @staticmethod
    def _say(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            start = "\n" if sys.stderr.isatty() else ""  # there may be a bar on the line
            os.write(sys.stderr.fileno(), f"{start}dlrm: {text}\n".encode())


def exit_code(number: signal.Signals) -> int:
    """What shells and schedulers know as ended by this signal."""
    return 128 + number
