"""What started this process: torchrun, srun or mpirun; which ranks there are, and which of them share a host."""

import os
import platform
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dlrm.errors import LaunchError

_MPI_VARIABLES = {
    "mpirun": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH's mpirun": tuple(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "jsrun": tuple(f"JSM_NAMESPACE_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "flux run": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
}
"""Rank, number of ranks, rank on its host, ranks of the host."""
_FIRST_PORT, _NUM_PORTS = 15_000, 16_000
"""Below those that Linux hands out by itself."""


@dataclass(frozen=True)
class _Started:
    """The variables by which a launcher tells a process its rank. `size_variable` holds the number of ranks."""

    launcher: str
    size_variable: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None


def adopt_launcher() -> None:
    """Has ranks that srun or mpirun started find each other as torchrun's do: sets torchrun's variables.

    Variables that are set stay. The script of an sbatch job is one process, however many tasks the job has.

    Raises:
        LaunchError: on every rank, if several processes would each take themselves for the only one, or if nobody says
            where they meet.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    started = _read_mpi(os.environ) or _read_slurm_step(os.environ)
    if started is None and "RANK" not in os.environ:
        _check_alone(os.environ)
    if started is None or started.size == 1:
        return
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        _check_world_size(started)
        return
    variables = {"RANK": str(started.rank), "WORLD_SIZE": str(started.size), **_find_meeting_place(os.environ, started)}
    if started.local_rank is not None and started.local_size is not None:
        variables |= {"LOCAL_RANK": str(started.local_rank), "LOCAL_WORLD_SIZE": str(started.local_size)}
    known = os.environ.keys() | variables.keys()
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in known]:
        raise LaunchError(
            f"{started.launcher} has started {started.size} processes ({started.size_variable}), and nothing says "
            f"where they meet. Start with torchrun, or set {' and '.join(missing)}: rank 0's host, and a free port "
            "there."
        )
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def note_separate_launchers() -> str | None:
    """A warning if srun has started several torchruns that know nothing of each other; None otherwise.

    It may be meant: of an elastic job, hosts may be gone.
    """
    launchers, step = (os.environ.get(name, "") for name in ("GROUP_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if not (launchers.isdigit() and step.isdigit() and int(launchers) < int(step)):
        return None
    return (
        f"WARNING: srun has started {step} tasks (SLURM_STEP_NUM_TASKS), and this training is of {launchers} of them. "
        "If each of them trains a model of its own, start one torchrun a host, all with the same --nnodes and "
        "--rdzv_endpoint."
    )


def _check_alone(environment: Mapping[str, str]) -> None:
    """Refuses a task that has a number of its own, but does not know how many there are.

    A container is often given SLURM_PROCID and SLURM_NTASKS alone. A batch script, which runs once, has task number 0.
    """
    for name in ("SLURM_PROCID", "PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        number = environment.get(name, "")
        alone = environment.get("SLURM_STEP_NUM_TASKS") == "1"
        if number.isdigit() and int(number) > 0 and not alone:
            raise LaunchError(
                f"{name}={number}: this is one of several tasks, and nothing says how many there are. Start with "
                "torchrun, or give the process all variables of its launcher."
            )


def _check_world_size(started: _Started) -> None:
    """Refuses RANK and WORLD_SIZE that are the same for all of a launcher's processes."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if world_size.isdigit() and int(world_size) < started.size:
        raise LaunchError(
            f"WORLD_SIZE={world_size}, but {started.launcher} has started {started.size} processes "
            f"({started.size_variable}). Unset RANK and WORLD_SIZE, or start with torchrun."
        )


def _read_mpi(environment: Mapping[str, str]) -> _Started | None:
    for launcher, (rank, size, local_rank, local_size) in _MPI_VARIABLES.items():
        if rank in environment and size in environment:
            return _Started(
                launcher,
                size,
                _read_number(environment, rank),
                _read_number(environment, size),
                _read_number(environment, local_rank) if local_rank in environment else None,
                _read_number(environment, local_size) if local_size in environment else None,
            )
    return None


def _read_slurm_step(environment: Mapping[str, str]) -> _Started | None:
    """This task of srun's. None outside of a step: a batch script has the job's SLURM_NTASKS, and is alone."""
    size = "SLURM_STEP_NUM_TASKS"
    if size not in environment or _read_number(environment, size) == 1:
        return None
    if environment.get("SLURM_NTASKS", environment[size]) != environment[size] or "SLURM_HET_SIZE" in environment:
        raise LaunchError(
            f"Slurm says {size}={environment[size]} and SLURM_NTASKS={environment.get('SLURM_NTASKS')}, as in a job "
            "of several components, or one submitted from inside another. Start with torchrun."
        )
    tasks = _expand_tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _read_number(environment, "SLURM_NODEID")
    return _Started(
        "srun",
        size,
        _read_number(environment, "SLURM_PROCID"),
        _read_number(environment, size),
        _read_number(environment, "SLURM_LOCALID"),
        tasks[node] if node < len(tasks) else None,
    )


def _expand_tasks(text: str) -> list[int]:
    """Tasks of each node, in Slurm's notation: 2(x3),1 is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes or 1))]


def _find_meeting_place(environment: Mapping[str, str], started: _Started) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of the tasks of a Slurm step; nothing for others, whose port nobody can know."""
    step = [environment.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID")]
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    of_step = (environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS"))
    if not nodes or not all(map(str.isdigit, step)) or of_step != (str(started.rank), str(started.size)):
        return {}
    job, number = map(int, step)
    is_alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    return {
        "MASTER_ADDR": "127.0.0.1" if is_alone else first_host(nodes),
        "MASTER_PORT": str(_FIRST_PORT + (31 * job + number) % _NUM_PORTS),
    }


def first_host(nodes: str) -> str:
    """The first of hosts in Slurm's notation: node[01-04,7],other is node01."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _read_number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isascii() or not text.isdigit():
        raise LaunchError(f"{name}={text}: expected a whole number. Start with torchrun.")
    return int(text)


@dataclass(frozen=True)
class Seat:
    """A rank's place, as it says itself. `host` names what its processes share; the numbers may be left open."""

    host: str
    container: str
    local_rank: int | None
    local_world_size: int | None

    @staticmethod
    def own(local_rank: int | None, local_world_size: int | None) -> "Seat":
        """This process's. Pods that use their host's network have its name, and processes of their own."""
        boot, container = "", ""
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        with suppress(OSError):
            container = str(Path("/proc/self/ns/pid").readlink())
        return Seat(f"{platform.node()} {boot}".rstrip(), container, local_rank, local_world_size)


def assign_seats(seats: Sequence[Seat]) -> list[tuple[int, int]]:
    """Each rank's local rank and local world size; what a rank leaves open, the hosts' names decide.

    Several launchers on one host are as many hosts.

    Raises:
        LaunchError: on every rank, if what ranks say contradicts what they share, or if a host's ranks are not
            numbered in a row, as TorchRec takes them to be.
    """
    members = defaultdict(list)
    for rank, seat in enumerate(seats):
        members[seat.host, seat.container].append(rank)
    assigned = [(0, 1)] * len(seats)
    for ranks in members.values():
        for place, rank in enumerate(ranks):
            seat = seats[rank]
            size = len(ranks) if seat.local_world_size is None else seat.local_world_size
            assigned[rank] = (place if seat.local_rank is None else seat.local_rank, size)
    for rank, (local_rank, size) in enumerate(assigned):
        first = rank - local_rank
        expected = [(seats[rank].host, place, size) for place in range(size)]
        found = [(seats[other].host, *assigned[other]) for other in range(max(0, first), min(first + size, len(seats)))]
        if found != expected:
            raise LaunchError(
                f"rank {rank} is local rank {local_rank} of {size} on {seats[rank].host.split(' ')[0]} (LOCAL_RANK and "
                f"LOCAL_WORLD_SIZE, or by host names), so ranks {first} to {first + size - 1} should be there, in that "
                "order, and are not. Start with torchrun, or unset both variables and number a host's ranks in a row."
            ).raised_everywhere()
    return assigned
