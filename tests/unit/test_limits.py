"""Control groups as machines, containers and schedulers set them up, and what they leave to a process."""

import itertools
import multiprocessing
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from dlrm.dataset.binary_days import open_splits
from dlrm.errors import ShortageError
from dlrm.system import host
from dlrm.system.limits import (
    allow_open_files,
    cpu_quota,
    free_memory_of_groups,
    free_memory_of_process,
    open_files_limit,
)
from tests.distributed.test_faults import write_days

GIB = 1 << 30
V1_HYBRID = "5:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:/init\n0::/init\n"
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "22 1 254:1 / / rw,relatime - ext4 /dev/vda rw\n"
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)


def write(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A file system with these files below /sys/fs/cgroup."""
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def v2(path: str, root: str = "/") -> tuple[str, str]:
    return f"0::{path}\n", V2_MOUNT.format(root=root)


def v1(path: str, root: str = "/") -> tuple[str, str]:
    return V1_HYBRID.format(path=path), V1_MOUNTS.format(root=root)


@pytest.mark.parametrize(
    ("tree", "files", "quota"),
    [
        (("", ""), {}, None),
        (v2("/a/b"), {"a/b/cpu.max": "max 100000", "a/cpu.max": "max 100000"}, None),
        (v2("/a/b"), {"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, 1.5),
        (v2("/a/b"), {"a/b/cpu.max": "max 100000", "a/cpu.max": "25000 50000"}, 0.5),  # above it
        (v2("/"), {"cpu.max": "200000 100000"}, 2.0),  # a container with a name space of its own
        (v2("/docker/x"), {"cpu.max": "200000 100000"}, 2.0),  # the host's path, of which nothing is mounted
        (v2("/../../b"), {"cpu.max": "300000 100000", "../b/cpu.max": "100000 100000"}, 3.0),
        (v1("/a"), {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, 0.5),
        (v1("/a"), {"cpu,cpuacct/a/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}, None),
        # A container without a name space: its group is what is mounted.
        (
            v1("/docker/x", root="/docker/x"),
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4.0,
        ),
    ],
)
def test_cpu_quotas(tmp_path: Path, tree: tuple[str, str], files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(write(tmp_path, *tree, files)) == quota


@pytest.mark.parametrize(
    ("tree", "files", "free"),
    [
        (("", ""), {}, None),
        (v2("/a"), {"a/memory.max": "max", "a/memory.current": "7"}, None),
        (
            v2("/a/b"),
            {
                "a/b/memory.max": "max",
                "a/memory.max": str(4 * GIB),
                "a/memory.current": str(3 * GIB),
                "a/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {GIB // 2}",
            },
            2.5 * GIB,
        ),
        (
            v2("/a"),
            {"a/memory.max": str(4 * GIB), "a/memory.high": str(3 * GIB), "a/memory.current": str(GIB)},
            2 * GIB,
        ),
        (
            v1("/a"),
            {
                "memory/a/memory.limit_in_bytes": str(4 * GIB),
                "memory/a/memory.usage_in_bytes": str(3 * GIB),
                "memory/a/memory.stat": f"active_file 1\ntotal_active_file {GIB}\ntotal_inactive_file {GIB // 2}",
            },
            2.5 * GIB,
        ),
        # The group above has the lower limit, and a container does not see it but in a line of its own.
        (
            v1("/docker/x", root="/docker/x"),
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": str(GIB),
                "memory/memory.stat": f"hierarchical_memory_limit {2 * GIB}",
            },
            GIB,
        ),
    ],
)
def test_memory_of_groups(tmp_path: Path, tree: tuple[str, str], files: dict[str, str], free: float | None) -> None:
    assert free_memory_of_groups(write(tmp_path, *tree, files)) == free


@pytest.mark.parametrize(
    ("quota", "cores", "processes", "usable"),
    [(None, 8, 2, 8), (0.5, 8, 1, 1), (3.9, 8, 1, 3), (4.0, 4, 2, 2), (4.0, 1, 2, 1), (64.0, 8, 1, 8)],
)
def test_a_quota_counts_in_whole_cores(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int, processes: int, usable: int
) -> None:
    monkeypatch.setattr(host, "cpu_quota", lambda: quota)
    assert host.usable_cores(cores, processes) == usable


def test_the_least_of_all_limits_of_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for of_groups, of_process, processes, expected in ((None, 5, 2, 10), (7, 5, 2, 7), (7, None, 1, 7), (-3, 5, 1, 0)):
        monkeypatch.setattr(host, "free_memory_of_groups", lambda free=of_groups: free)
        monkeypatch.setattr(host, "free_memory_of_process", lambda free=of_process: free)
        assert host.available_memory_bytes(processes) == expected


def forked(run: Callable[[], object]) -> object:
    """What a function gives in a process of its own, whose limits are its own."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=lambda: results.put(run()))
    process.start()
    process.join(60)
    return results.get()


def test_ulimits_of_memory() -> None:
    def measure() -> tuple[int | None, int | None]:
        before = free_memory_of_process()
        resource.setrlimit(resource.RLIMIT_AS, (1 << 45, resource.RLIM_INFINITY))
        return before, free_memory_of_process()

    before, after = forked(measure)  # type: ignore[misc]
    assert before is None
    assert 0 < after < 1 << 45


def test_the_limit_of_open_files_is_raised_as_far_as_needed() -> None:
    def raise_it() -> tuple[int, str]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 2000))
        allow_open_files(1000, "days")
        try:
            allow_open_files(1800, "days")
        except ShortageError as error:
            return open_files_limit(), str(error)
        return 0, ""

    soft, said = forked(raise_it)  # type: ignore[misc]
    assert soft == 1256
    assert said.startswith("days: 1,800 files to hold open and up to 256 beside them, and this process may open 2,000")


@pytest.mark.parametrize(
    ("hard", "expected"),
    [(4096, "399 training days"), (1024, "1,200 files to hold open .* may open 1,024 .ulimit -Hn")],
)
def test_more_days_than_files_that_may_be_open(tmp_path: Path, hard: int, expected: str) -> None:
    write_days(tmp_path / "day", (4,))
    (tmp_path / "days").mkdir()
    for day, part in itertools.product(range(400), ("dense", "sparse", "labels")):
        (tmp_path / "days" / f"day_{day}_{part}.npy").symlink_to(tmp_path / "day" / f"day_0_{part}.npy")

    def open_all() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            return f"{len(open_splits(tmp_path / 'days', 'criteo_1t')['train'].pieces)} training days"
        except ShortageError as error:
            return str(error)

    assert re.search(expected, str(forked(open_all)))
