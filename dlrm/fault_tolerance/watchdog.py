"""Finds the rank that hangs when all others wait for it."""

import faulthandler
import json
import os
import re
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dlrm.errors import EXIT_HANGS
from dlrm.ranks.runtime import Runtime

_CHECKS_PER_TIMEOUT = 8
_LONGEST_INTERVAL = 15.0
_SECONDS_FOR_VERDICT = 10.0
_SECONDS_FOR_STORE = 30.0
_SECONDS_TO_WAKE = 5.0
"""A process can stand still for a second or two although nothing is wrong: its core or virtual machine was paused."""


class Watchdog:
    """Looks at the main thread from another one; ranks tell each other through the launcher's key-value store.

    While the run is well it knows of the main thread what `beat` has noted, and never takes its frames: these hold
    their tensors for as long, and below Python 3.11.9 taking them can deadlock
    (https://github.com/python/cpython/issues/106883).
    """

    def __init__(self, runtime: Runtime, timeout: float) -> None:
        """Makes one; `start` has it watch.

        Args:
            timeout: seconds without a beat after which the run ends.
        """
        self._runtime, self._timeout = runtime, timeout
        self._interval = min(_LONGEST_INTERVAL, timeout / _CHECKS_PER_TIMEOUT)
        self._main = threading.main_thread().ident
        self._beats = 0
        self._written = 0
        self._doing = "starting"
        self._place = ""
        self._at = time.monotonic()
        self._published = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._store: Any = None
        if runtime.world_size > 1:
            store: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("dlrm/watchdog", store.clone())  # a connection of this thread's own
            self._store.set_timeout(timedelta(seconds=_SECONDS_FOR_STORE))

    def start(self) -> "Watchdog":
        """Begins to watch. Collective."""
        self._publish()
        if self._runtime.world_size > 1:
            dist.barrier(group=self._runtime.control_group)
        self._at = time.monotonic()
        self._thread.start()
        return self

    def beat(self, doing: str) -> None:
        """The main thread is alive, and about to do this. Cheap. All ranks beat in the same order."""
        self._doing = doing
        self._beats += 1
        self._at = time.monotonic()

    def note_written(self) -> None:
        """Some more of a checkpoint is written. Cheap; may be called from any thread."""
        self._written += 1
        self._at = time.monotonic()

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(self._interval):
            now = time.monotonic()
            if now - looked > self._timeout / 2:  # this process stood still, which says nothing about the others
                self._at = now
            looked = now
            self._publish()
            if now - self._at > self._timeout:
                self._give_up()

    def _publish(self) -> None:
        self._published += 1
        if self._store is None:
            return
        try:
            self._store.set(str(self._runtime.rank), json.dumps(self._status()))
        except RuntimeError:  # the launcher is gone, and will have ended this process soon
            self._stopped.set()

    def _status(self) -> dict[str, Any]:
        return {
            "published": self._published,
            "beats": self._beats,
            "written": self._written,
            "doing": self._doing,
            "host": os.uname().nodename,
            "place": self._place,
        }

    def _give_up(self) -> None:
        self._place = _place_of(self._main or 0)
        try:
            verdict = self._judge()
        except RuntimeError as error:
            verdict = f"{_show(self._status())}; other ranks can't be asked ({error})", []
        if verdict is None:
            self._at, self._place = time.monotonic(), ""
            return
        text, accused = verdict
        free = [rank for rank in range(self._runtime.world_size) if rank not in accused]
        if free and self._runtime.rank != free[0]:
            time.sleep(_SECONDS_FOR_VERDICT)  # one rank is enough to say it
        else:
            waited = f"no step for {self._timeout:g} s (--hang_timeout)"
            print(f"dlrm: error: {waited}: {text}", file=sys.stderr, flush=True)
        os._exit(EXIT_HANGS)

    def _judge(self) -> tuple[str, list[int]] | None:
        """Says what is wrong, and which ranks are to blame.

        None while a checkpoint is being written, block by block, and if a rank only stood still and is awake again.

        Raises:
            RuntimeError: if the launcher's store does not answer.
        """
        if self._store is None:
            return _show(self._status()), []
        # All ranks run the same steps, so the one that hangs keeps all others waiting in a collective. Two questions
        # tell it apart, asked of what each rank publishes, over two intervals:
        #
        #   published   counts looks of the watchdog's thread. It stands still if the whole process does: stopped,
        #               swapped out, its host gone. It gets some seconds to wake up.
        #   beats       counts what the main thread has begun. The ranks that wait have begun the collective; the one
        #               that hangs has not come to it, so it has fewer beats.
        #   written     counts blocks of a checkpoint. As long as some rank writes, the others wait for a reason.
        before = self._read_all()
        for _ in range(4):
            time.sleep(self._interval / 2)
            self._publish()
        after = self._read_all()
        if any(after[rank]["written"] > before[rank]["written"] for rank in after):
            return None
        silent, waited = _silent(before, after), 0.0
        while silent and waited < _SECONDS_TO_WAKE:
            time.sleep(self._interval)
            waited += self._interval
            self._publish()
            silent = _silent(before, self._read_all())
            if not silent:
                return None
        if silent:
            return f"{_name(silent, after)} gives no sign of life. {_last(silent, after)}", silent
        fewest = min(status["beats"] for status in after.values())
        behind = [rank for rank, status in after.items() if status["beats"] == fewest]
        if len(behind) < len(after):
            return f"{_name(behind, after)} hangs. {_last(behind, after)}", behind
        places = ", ".join(f"rank {rank} {_show(status)}" for rank, status in after.items())
        return f"no rank is behind the others. {places}", []

    def _read_all(self) -> dict[int, dict[str, Any]]:
        return {rank: json.loads(self._store.get(str(rank))) for rank in range(self._runtime.world_size)}


def _silent(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> list[int]:
    """Ranks whose watchdog has not looked between two readings."""
    return [rank for rank in after if after[rank]["published"] == before[rank]["published"]]


def _name(ranks: list[int], statuses: dict[int, dict[str, Any]]) -> str:
    return ", ".join(f"rank {rank} on {statuses[rank]['host']}" for rank in ranks)


def _last(ranks: list[int], statuses: dict[int, dict[str, Any]]) -> str:
    return f"It was {_show(statuses[ranks[0]])}."


def _show(status: dict[str, Any]) -> str:
    """What a rank was doing, and at which line, if it has found that out."""
    return f"{status['doing']}, at {status['place']}" if status["place"] else status["doing"]


def _place_of(thread: int) -> str:
    """Where a thread is in this project's own code; empty if that can't be told.

    faulthandler writes the stack as text, so that nothing refers to frames or what they hold. It writes to memory: a
    disk may be what the run waits for.
    """
    if not hasattr(os, "memfd_create"):
        return ""
    with os.fdopen(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        text = file.read().decode(errors="replace")
    stack = re.search(rf"hread 0x0*{thread:x}\b.*:\n((?:  .*\n?)+)", text)
    calls = re.findall(r'File "(.*)", line (\d+) in (.*)', stack[1]) if stack else []
    if not calls:
        return ""
    file_name, line, _ = next((call for call in calls if f"{os.sep}dlrm{os.sep}" in call[0]), calls[0])
    return f"{Path(file_name).name}:{line} ({calls[0][2]})"
