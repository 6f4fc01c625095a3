"""Sides of a comparison, each in processes of its own that work only when it is their turn.

Sides are alive at the same time and share nothing: what one sets for its process (malloc, threads, core binding) does
not reach another. Between turns a process blocks on a socket, and so takes no core from the side whose turn it is.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dlrm.errors import DlrmError
from dlrm.system.host import available_cores

Turn = Callable[[], Any]
Turns = Mapping[str, Turn]

_TUNING_PREFIXES = ("MALLOC_", "OMP_", "GOMP_", "KMP_")
_TUNING_NAMES = ("LD_PRELOAD", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
_SECONDS_TO_LEAVE = 10.0


class WorkerError(DlrmError):
    """A side's process that ended before its work was done."""


@dataclass(frozen=True)
class Side:
    """What a side's processes do. Everything in it is pickled.

    Attributes:
        name: as tables and JSON have it.
        open: called in each process with `arguments`; gives the side's turns by name, until it is left.
        turns: those of them that each round takes, in order.
        ranks: processes, which share all cores.
        has_group: whether they form a gloo group before the side is opened.
        is_plain: start as torchrun starts any program, a thread for each of the rank's cores, and without what the
            caller's environment says of malloc, threads and preloaded libraries. Else start as dlrm_main.py does.
    """

    name: str
    open: Callable[..., AbstractContextManager[Turns]]
    arguments: tuple[Any, ...]
    turns: tuple[str, ...]
    ranks: int = 1
    has_group: bool = True
    is_plain: bool = False

    @property
    def threads_per_rank(self) -> int:
        """Each rank's share of the cores."""
        return max(1, available_cores() // self.ranks)


@dataclass(frozen=True)
class Reply:
    """What a rank's turn gave. `peak_rss_gib` is the process's peak of resident memory so far."""

    value: Any
    peak_rss_gib: float


@contextmanager
def start_workers(side: Side) -> Iterator["Workers"]:
    """A side's processes, until they are left: at once after an error."""
    workers = Workers(side)
    try:
        yield workers
    except BaseException:
        workers.close(at_once=True)
        raise
    workers.close()


class Workers:
    """A side's processes. They start at once and open the side; `take_turn` waits for that."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._folder = tempfile.TemporaryDirectory()
        self._is_open = False
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        store = str(Path(self._folder.name, "store"))
        for rank in range(side.ranks):
            ours, theirs = Pipe()
            with theirs:
                start = "plain" if side.is_plain else "ours"
                command = [sys.executable, "-m", "dlrm.bench.harness.worker", str(theirs.fileno()), start]
                process = subprocess.Popen(command, env=environment(side, rank), pass_fds=(theirs.fileno(),))
            self._connections.append(ours)
            self._processes.append(process)
            ours.send((side, store))

    def open(self) -> None:
        """Waits until every rank has opened the side.

        Raises:
            DlrmError: what a rank raised, or that it ended.
        """
        if not self._is_open:
            self._gather()
            self._is_open = True

    def take_turn(self, name: str) -> list[Reply]:
        """Has all ranks take a turn; their replies, by rank.

        Raises:
            DlrmError: what a rank raised, or that it ended.
        """
        self.open()
        for connection in self._connections:
            connection.send(name)
        return self._gather()

    def _gather(self) -> list[Reply]:
        """One reply from each rank, in whatever order they come: a rank that fails leaves others waiting for it."""
        replies: dict[int, Reply] = {}
        while len(replies) < len(self._connections):
            for ready in wait([c for rank, c in enumerate(self._connections) if rank not in replies]):
                rank = self._connections.index(ready)  # type: ignore[arg-type] # only connections are waited for
                replies[rank] = self._receive(rank)
        return [replies[rank] for rank in range(len(replies))]

    def _receive(self, rank: int) -> Reply:
        try:
            reply = self._connections[rank].recv()
        except (EOFError, ConnectionResetError):
            code = self._processes[rank].wait(_SECONDS_TO_LEAVE)
            raise WorkerError(
                f"rank {rank} of {self.side.name} ended with {code}. What it wrote above says why; -9 without a word "
                "is usually too little memory: give smaller tables."
            ) from None
        if isinstance(reply, DlrmError):
            raise reply
        return reply

    def close(self, *, at_once: bool = False) -> None:
        """Ends the processes: when they are ready, or at once."""
        for connection in self._connections:
            connection.close()  # a process that waits for its turn reads an end of file, and leaves
        for process in self._processes:
            if at_once:
                process.kill()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_LEAVE)
                continue
            process.kill()
            process.wait()
        self._folder.cleanup()


def environment(side: Side, rank: int) -> dict[str, str]:
    """The environment of a side's process: ranks as torchrun sets them, no GPUs."""
    if side.is_plain:
        kept = {name: value for name, value in os.environ.items() if not is_tuning(name)}
        kept["OMP_NUM_THREADS"] = str(side.threads_per_rank)
    else:
        kept = dict(os.environ)
    return {
        **kept,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(side.ranks),
        "LOCAL_WORLD_SIZE": str(side.ranks),
        "CUDA_VISIBLE_DEVICES": "",
    }


def is_tuning(name: str) -> bool:
    """Whether a variable changes allocator, threads or libraries of a process."""
    return name.startswith(_TUNING_PREFIXES) or name in _TUNING_NAMES
