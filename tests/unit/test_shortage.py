import errno
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from dlrm.errors import ShortageError
from dlrm.system import shortage
from dlrm.system.ending import exit_code_of
from dlrm.system.shortage import explain_shortage, shortage_as_error


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**48, dtype=torch.float32),
        lambda: np.empty(2**48, np.float32),
        lambda: torch.UntypedStorage(2**50),
    ],
)
def test_allocators_that_give_up_say_how_much_was_asked_for(allocate) -> None:
    said = r"^out of memory: 1[,.0-9]+ [PG]iB asked for, [\d.]+ [GM]iB free\. Raise"
    with pytest.raises(ShortageError, match=said), shortage_as_error():
        allocate()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory, "),
        (RuntimeError("std::bad_alloc"), "out of memory, "),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory, "),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory, "),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"), "the GPU: 20.00 MiB asked for. Use"),
        (RuntimeError("can't start new thread"), "no more threads or processes can be started"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no more threads or processes can be started"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "day_7"), r"^day_7: too many open files: .*\(ulimit -n\)"),
    ],
)
def test_what_ran_out(error: Exception, said: str) -> None:
    with pytest.raises(ShortageError, match=said), shortage_as_error():
        raise error


def test_a_peers_socket_is_no_shortage() -> None:
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection reset by peer: Resource temporarily unavailable")
    assert shortage.explain_shortage(lost) is None


def test_less_room_than_libraries_take(monkeypatch) -> None:
    for free, is_enough in ((None, True), (1 << 30, True), (1 << 29, False)):
        monkeypatch.setattr(shortage, "free_memory_of_process", lambda free=free: free)
        with nullcontext() if is_enough else pytest.raises(ShortageError, match=r"512\.0 MiB of address space free"):
            shortage.check_room_for_libraries()


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("size mismatch"), OSError(errno.ENOSPC, "disk"), ImportError("no module"), KeyError()):
        assert explain_shortage(error) is None


def test_every_command_tells_it_in_one_line(capsys) -> None:
    assert exit_code_of("dlrm verify", lambda: np.empty(2**48, np.float32).size) == 2
    assert capsys.readouterr().err.startswith("dlrm verify: error: out of memory: 1.00 PiB asked for")
