"""A process of a side: python -m dlrm.bench.harness.worker SOCKET plain|ours. `workers` is at the other end."""

import os
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

from dlrm.bench.harness.workers import Reply
from dlrm.errors import DlrmError
from dlrm.system.allocator import tune_process
from dlrm.system.host import end_with_parent
from dlrm.system.quiet import quieten_libraries


def main() -> None:
    """Opens a side, takes turns as they are asked for, and leaves when nobody asks any more."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    warnings.simplefilter("ignore")
    connection = Connection(int(sys.argv[1]))
    if sys.argv[2] == "ours":
        tune_process()  # first of all, as dlrm_main.py does: what follows loads torch
    try:
        try:
            serve(connection)
        except DlrmError as error:
            connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody is at the other end any more
        return


def serve(connection: Connection) -> None:
    """Until the other end is closed.

    Raises:
        EOFError: when it is.
    """
    quieten_libraries()
    side, store = connection.recv()  # loads the side's module, and torch with it
    if side.has_group:
        _join_group(side.ranks, store)
    with side.open(*side.arguments) as turns:
        connection.send(Reply(None, peak_rss_gib()))
        while True:
            name = connection.recv()
            connection.send(Reply(turns[name](), peak_rss_gib()))


def _join_group(world_size: int, store: str) -> None:
    import torch.distributed as dist  # here and not above: a side without a group may do without torch

    # A port could be taken by the time that the group forms; a file of our own can't.
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)


def peak_rss_gib() -> float:
    """Peak of this process's resident memory. What getrusage says may be the parent's: it outlives exec."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


if __name__ == "__main__":
    main()
