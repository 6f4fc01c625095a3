"""What the trainer tells glibc about freed memory."""

import os
import subprocess
import sys

import pytest

from dlrm.system.allocator import sleep_while_waiting

GIVEN_BACK = """
import ctypes, os
from dlrm.system.allocator import describe_allocator, keep_freed_memory

libc = ctypes.CDLL(None)
if not hasattr(libc, "mallopt"):
    raise SystemExit("not glibc")
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
keep_freed_memory()
block = libc.malloc(5 << 29)
assert block, "2.5 GiB of address space"
top = libc.sbrk(0)
libc.free(block)
print(top - libc.sbrk(0), describe_allocator())
"""


@pytest.mark.parametrize(
    ("environment", "kept", "said"),
    [
        ({}, True, "memory by malloc, which keeps what is freed"),
        ({"MALLOC_MMAP_MAX_": "0"}, False, "memory by malloc as MALLOC_MMAP_MAX_ says"),
    ],
)
def test_more_than_two_gigabytes_stay_unless_the_user_chose_otherwise(
    environment: dict[str, str], kept: bool, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK],
        env={"PATH": "/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if "not glibc" in done.stderr:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    given_back, words = done.stdout.split(maxsplit=1)
    assert (int(given_back) == 0, words.strip()) == (kept, said)


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_sleep_soon_unless_the_user_chose_otherwise(
    chosen: dict[str, str], spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    sleep_while_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
