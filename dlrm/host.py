"""What this host has to give."""

import os
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Memory that processes may still take: what the kernel has available, or less where a cgroup (v2) caps it.

    Page cache inside a cgroup counts as free: the kernel gives it back.
    """
    available = psutil.virtual_memory().available
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/")
    folder = _CGROUPS / own.lstrip("/")
    for group in (folder, *folder.parents):
        if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = int(stat.get("active_file", 0)) + int(stat.get("inactive_file", 0))
            available = min(available, int(limit) - used + cache)
    return max(0, available)


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
