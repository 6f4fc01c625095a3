"""Cores and memory of this host that a process may take."""

import ctypes
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from dlrm.system.limits import cpu_quota, free_memory_of_groups, free_memory_of_process

_SYSTEM = Path("/sys/devices/system")
_PR_SET_PDEATHSIG = 1
_LOWEST = 19  # niceness
_STEPS_BACK = 10  # a tenth of the time that a thread without it gets


def end_with_parent(number: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends, however that ends. Linux only; else nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def give_way() -> None:
    """Has the calling thread yield to the other threads of this process that want to run. Linux only; else nothing."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(_LOWEST, os.getpriority(os.PRIO_PROCESS, thread) + _STEPS_BACK))


def available_memory_bytes(processes: int = 1) -> int:
    """Memory that this process and others like it may still take together.

    It is what the kernel has available, or less if a control group or a ulimit caps it. A ulimit is each process's own.
    """
    available = [psutil.virtual_memory().available]
    if (of_groups := free_memory_of_groups()) is not None:
        available.append(of_groups)
    if (of_process := free_memory_of_process()) is not None:
        available.append(of_process * processes)
    return max(0, min(available))


def available_cores() -> int:
    """Cores that this process may use: those that it may run on, or fewer if its CPU quota is less, but one."""
    return usable_cores(len(os.sched_getaffinity(0)))


def usable_cores(cores: int, processes: int = 1) -> int:
    """How many of a process's cores its share of the CPU quota keeps busy, one at least.

    More threads than that are stopped for a part of each period, and the others wait for them.
    """
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota / processes)))


def chosen_threads() -> int | None:
    """OMP_NUM_THREADS as the user set it; None if it is not set, or only torchrun set it.

    torchrun gives each of several workers OMP_NUM_THREADS=1 where nobody gave it one, which would leave cores idle.
    """
    text = os.environ.get("OMP_NUM_THREADS", "")
    if not text.isdigit() or int(text) == 0:
        return None
    if text == "1" and "TORCHELASTIC_RUN_ID" in os.environ and not _launcher_had("OMP_NUM_THREADS"):
        return None
    return int(text)


def _launcher_had(name: str) -> bool:
    """Whether the parent process was started with this variable; True if that can't be read."""
    try:
        variables = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return any(variable.startswith(f"{name}=".encode()) for variable in variables)


@dataclass(frozen=True)
class Core:
    """One of the system's processors. Those with the same `node`, `package` and `number` are threads of one core."""

    node: int
    package: int
    number: int
    cpu: int

    @property
    def physical(self) -> tuple[int, int]:
        """The same for threads of one core."""
        return self.package, self.number


def allowed_cores(system: Path = _SYSTEM) -> list[Core]:
    """Processors that this process may run on, neighbours in memory and in core beside each other."""
    nodes = {}
    for folder in system.glob("node/node[0-9]*"):
        nodes |= dict.fromkeys(_parse_cpus((folder / "cpulist").read_text()), int(folder.name[4:]))
    cores = []
    for cpu in os.sched_getaffinity(0):
        topology = system / f"cpu/cpu{cpu}/topology"
        package, number = (_read_number(topology / name, cpu) for name in ("physical_package_id", "core_id"))
        cores.append(Core(nodes.get(cpu, 0), package, number, cpu))
    return sorted(cores, key=lambda core: (core.node, core.package, core.number, core.cpu))


def share_of_rank(cores: list[Core], local_rank: int, local_world_size: int) -> list[Core]:
    """The cores of one of the ranks of a host: as many as the others have, give or take one, and next to each other."""
    if len(cores) < local_world_size:
        return cores
    start, stop = (len(cores) * rank // local_world_size for rank in (local_rank, local_rank + 1))
    return cores[start:stop]


def is_bound_already() -> bool:
    """Whether the launcher gave this process other cores than it has itself."""
    try:
        return os.sched_getaffinity(0) != os.sched_getaffinity(os.getppid())
    except OSError:
        return True


def _parse_cpus(text: str) -> list[int]:
    """The numbers in a list such as 0-3,8."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1) if first else ()
    return cpus


def _read_number(path: Path, default: int) -> int:
    return int(path.read_text()) if path.exists() else default


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU, as Linux names them: avx2, avx512_bf16, amx_bf16, ..."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(flags.split())
