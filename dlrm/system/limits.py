"""What the kernel lets this process take: control groups (v1, v2, or both at a time) and ulimits."""

import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

from dlrm.errors import ShortageError

_ROOT = Path("/")
_OCTAL = re.compile(r"\\([0-7]{3})")
_FILES_BESIDE = 256
"""Open files that a process needs for libraries, sockets to other ranks, and what it writes."""


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Cores' worth of time that this process and those in its control group may take; None where nothing limits it.

    Args:
        root: of the file system, for tests.
    """
    quotas = []
    for group in _groups("cpu", root):
        text = _read(group / "cpu.max") or f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        quota, period = (int(word) if word.isdigit() else 0 for word in (*text.split(), "", "")[:2])
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def free_memory_of_groups(root: Path = _ROOT) -> int | None:
    """Bytes that the control groups of this process leave free; None where nothing limits them.

    Above `memory.high` a group is not killed, but slowed down to a crawl: it counts as a limit. Page
    cache inside a group counts as free: the kernel gives it back.
    """
    free = []
    for group in _groups("memory", root):
        limits = [_read(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = _read(group / "memory.current") or _read(group / "memory.usage_in_bytes")
        stat = dict(line.split() for line in _read(group / "memory.stat").splitlines() if len(line.split()) == 2)
        limits.append(stat.get("hierarchical_memory_limit", ""))  # v1: of groups above, which a container can't see
        cache = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("active_file", "inactive_file"))
        free += [int(limit) - int(used or 0) + cache for limit in limits if limit.isdigit()]
    return min(free, default=None)


def free_memory_of_process() -> int | None:
    """Bytes that `ulimit -v` and `ulimit -d` leave this process; None if they are unlimited."""
    memory = psutil.Process().memory_info()
    free = []
    for limit, used in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.data)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            free.append(max(0, soft - used))
    return min(free, default=None)


def open_files_limit() -> int:
    """Most files that this process may hold open now."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def allow_open_files(number: int, what: str) -> None:
    """Raises this process's limit of open files, if need be, so that it can hold `number` of one kind.

    Args:
        what: the files, for the error.

    Raises:
        ShortageError: if the hard limit is too low for that.
    """
    needed = number + _FILES_BESIDE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ShortageError(
            f"{what}: {number:,} files to hold open and up to {_FILES_BESIDE} beside them, and this process may open "
            f"{hard:,} (ulimit -Hn). Raise that limit: limits.conf, LimitNOFILE of the service, docker --ulimit nofile."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def is_address_space_limited() -> bool:
    """Whether what is mapped counts against a limit (`ulimit -v`)."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _groups(controller: str, root: Path) -> list[Path]:
    """Folders of this process's control group and of those above it, as far as they are mounted.

    A controller is in a hierarchy of v1 or in the one of v2. In a container the mount may begin below the hierarchy's
    root, or the process's path may be one that is not to be seen: then what is mounted is its own group.
    """
    paths = _own_paths(root)
    hierarchy = controller if controller in paths else ""
    mount = next((mount for mount in _mounts(root) if hierarchy in mount[0]), None)
    if mount is None or hierarchy not in paths:
        return []
    _, mounted, point = mount
    top = folder = root / point.lstrip("/")
    with suppress(ValueError):
        folder = top / PurePosixPath(paths[hierarchy]).relative_to(mounted)
    if ".." in folder.parts or not folder.is_dir():
        folder = top
    return [folder, *(above for above in folder.parents if above.is_relative_to(top))]


def _own_paths(root: Path) -> dict[str, str]:
    """Path of this process in the hierarchy of each controller of v1, and in v2, whose name is empty."""
    paths = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def _mounts(root: Path) -> Iterator[tuple[list[str], str, str]]:
    """Mounted hierarchies: their controllers, for v2 an empty one; the part that is mounted; and where."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(maxsplit=2)
        if kind in ("cgroup", "cgroup2"):
            mounted, point = (_OCTAL.sub(lambda code: chr(int(code[1], 8)), text) for text in mount.split()[3:5])
            yield [""] if kind == "cgroup2" else options.split(","), mounted, point


def _read(path: Path) -> str:
    """A file's text; empty if it is not there or may not be read."""
    with suppress(OSError):
        return path.read_text().strip()
    return ""
