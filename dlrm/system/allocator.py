"""How this process's memory is allocated, and how its threads wait. Call before torch is imported: it reads both once.

A step's large tensors live for milliseconds. By default glibc maps each of them and unmaps it after use. The kernel
then fills each page with zeros at its first touch, which can take as long as all that is computed.
"""

import ctypes
import os
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1
_SPINS = "1000"
_PRELOADED = ("jemalloc", "tcmalloc", "mimalloc")


def tune_process() -> None:
    """Has freed memory kept, and threads that wait sleep soon, as far as the user has not chosen otherwise."""
    keep_freed_memory()
    sleep_while_waiting()


def sleep_while_waiting() -> None:
    """Has OpenMP's threads spin for microseconds, not milliseconds, before they sleep.

    While they spin they take a core that another process may want, which costs a training beside a busy neighbour far
    more than waking up costs one that is alone (`python -m benchmarks.neighbour`). What the user has set
    (GOMP_SPINCOUNT, OMP_WAIT_POLICY) stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def keep_freed_memory() -> None:
    """Has freed memory reused, not returned to the system, and large tensors in huge pages.

    What the user has set in the environment (MALLOC_*, GLIBC_TUNABLES, THP_MEM_ALLOC_ENABLE) stays, and so does an
    allocator that was preloaded.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None and _chosen_by_user() is None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def describe_allocator() -> str:
    """For the start of a run."""
    return f"memory by {_chosen_by_user() or 'malloc, which keeps what is freed'}"


def _chosen_by_user() -> str | None:
    maps = Path("/proc/self/maps")
    mapped = maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""
    if (name := next((name for name in _PRELOADED if f"lib{name}" in mapped), None)) is not None:
        return name
    settings = sorted(name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES")
    return f"malloc as {', '.join(settings)} says" if settings else None
