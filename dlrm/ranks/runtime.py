"""The process group, this rank's device, threads, memory, and seeds."""

import dataclasses
import hashlib
import json
import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from dlrm.errors import DlrmError, LaunchError
from dlrm.kernels.exchange import exchange_in_memory
from dlrm.ranks.launcher import Seat, adopt_launcher, assign_seats
from dlrm.ranks.rendezvous import open_launch_store, share_texts
from dlrm.system.host import (
    allowed_cores,
    available_memory_bytes,
    chosen_threads,
    is_bound_already,
    share_of_rank,
    usable_cores,
)
from dlrm.system.limits import cpu_quota

T = TypeVar("T")

_CONTROL_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class Runtime:
    """This process among the others of the job. `rank` is global, `local_rank` picks the device.

    `host_memory_bytes` was free when the process joined, before any rank of the host took its part. `links` says what
    tensors travel by. `host_sizes` are the ranks of each host; empty where all hosts are as this one.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    host_memory_bytes: int = field(default_factory=available_memory_bytes)
    control_group: dist.ProcessGroup | None = None
    links: str = "no other rank"
    threads: str = "threads as they were"
    host_sizes: tuple[int, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    @property
    def block_size(self) -> int:
        """Ranks of a host as TorchRec counts them, the same on each: where hosts differ, blocks that fill every one."""
        return math.gcd(self.local_world_size, *self.host_sizes)

    @property
    def device_name(self) -> str:
        """`cpu`, or the GPU's name."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def describe(self) -> str:
        """One line for the start of a run."""
        hosts = len(self.host_sizes) or self.world_size // self.local_world_size
        counts = f"{count(self.world_size, 'rank')} on {count(hosts, 'host')}"
        if len(set(self.host_sizes)) > 1:
            counts += f" ({', '.join(map(str, self.host_sizes))})"
        return f"{counts}, {self.device_name}, {self.links}, {self.threads}, torch {torch.__version__}"


def count(number: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


@contextmanager
def start_runtime() -> Iterator[Runtime]:
    """Joins the launcher's process group, or makes one of a single process if there is no launcher.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them, or what srun and mpirun set. Without
    the local two, host names tell which ranks share a host. A group that the caller has already initialized is used and
    left standing.

    Raises:
        LaunchError: if the variables are incomplete or contradict each other, the port is taken, or there are fewer
            devices than local ranks.
    """
    owns_group = not dist.is_initialized()
    if owns_group:
        adopt_launcher()
    ranks = _read_launcher() if owns_group else _read_group()
    store = _open_store(ranks) if owns_group else None
    ranks = _find_hosts(ranks, store)
    host_memory_bytes = available_memory_bytes(ranks.local_world_size)
    device = _pick_device(ranks)
    threads = _arrange_threads(ranks.local_rank, ranks.local_world_size)
    if store is not None:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=ranks.rank, world_size=ranks.world_size
        )
    links = _link_ranks(ranks, device)
    is_joint = ranks.world_size == 1
    try:
        with _tell_torchrec(ranks):
            yield Runtime(
                ranks.rank,
                ranks.local_rank,
                ranks.world_size,
                ranks.local_world_size,
                device,
                host_memory_bytes,
                new_control_group(ranks.world_size),
                links,
                threads,
                ranks.host_sizes,
            )
        is_joint = True
    except DlrmError as error:
        is_joint = is_joint or error.everywhere
        raise
    finally:
        # A rank that fails alone must not wait for the others in NCCL's teardown: its message would never show.
        if owns_group and is_joint:
            dist.destroy_process_group()


def new_control_group(world_size: int) -> dist.ProcessGroup | None:
    """A group of all ranks for objects and decisions; None for a single rank. Collective.

    Objects travel over gloo, with patience: one rank may read its rows for long while another waits.
    """
    return None if world_size == 1 else new_gloo_group()


def new_gloo_group() -> dist.ProcessGroup:
    """A group of all ranks that waits for hours. Collective."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT))


@dataclass(frozen=True)
class _Ranks:
    """This rank, and what is known of its place on its host."""

    rank: int
    world_size: int
    given_local_rank: int | None = None
    given_local_world_size: int | None = None
    local_rank: int = 0
    local_world_size: int = 1
    host_sizes: tuple[int, ...] = (1,)


def _read_launcher() -> _Ranks:
    """This rank, as the launcher's variables say; a single process if none of them is set."""
    names = ("RANK", "WORLD_SIZE")
    given = [name for name in names if name in os.environ]
    if not given:
        return _Ranks(0, 1)
    if len(given) < len(names):
        raise LaunchError(f"{given[0]} is set but not all of {', '.join(names)}. Start with torchrun, or unset it.")
    rank, world_size = _read_count("RANK", 0), _read_count("WORLD_SIZE", 1)
    if rank >= world_size:
        raise LaunchError(f"RANK={rank}: expected less than WORLD_SIZE, which is {world_size}. Start with torchrun.")
    return _with_local(_Ranks(rank, world_size))


def _read_group() -> _Ranks:
    """This rank, as the caller's process group says."""
    return _with_local(_Ranks(dist.get_rank(), dist.get_world_size()))


def _with_local(ranks: _Ranks) -> _Ranks:
    """With what the launcher says of ranks on a host, as far as it does."""
    size = _read_count("LOCAL_WORLD_SIZE", 1) if "LOCAL_WORLD_SIZE" in os.environ else None
    rank = _read_count("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else None
    most, why = (ranks.world_size, "WORLD_SIZE") if size is None else (size, "LOCAL_WORLD_SIZE")
    if size is not None and size > ranks.world_size:
        raise LaunchError(
            f"LOCAL_WORLD_SIZE={size}: expected no more than WORLD_SIZE, which is {ranks.world_size}. Start with "
            "torchrun."
        )
    if rank is not None and rank >= most:
        raise LaunchError(f"LOCAL_RANK={rank}: expected less than {why}, which is {most}. Start with torchrun.")
    return dataclasses.replace(ranks, given_local_rank=rank, given_local_world_size=size)


def _find_hosts(ranks: _Ranks, store: dist.Store | None) -> _Ranks:
    """With which ranks share a host. Collective.

    Args:
        store: of this start; None in a process group of the caller's.
    """
    if ranks.world_size == 1:
        return ranks
    own = Seat.own(ranks.given_local_rank, ranks.given_local_world_size)
    if store is None:
        seats: list[Seat] = [own] * ranks.world_size
        group = new_gloo_group()
        dist.all_gather_object(seats, own, group=group)
        dist.destroy_process_group(group)
    else:
        texts = share_texts(
            dist.PrefixStore("dlrm/hosts", store), ranks.rank, ranks.world_size, json.dumps(dataclasses.asdict(own))
        )
        seats = [Seat(**json.loads(text)) for text in texts]
    assigned = assign_seats(seats)
    sizes = tuple(size for local_rank, size in assigned if local_rank == 0)
    local_rank, local_world_size = assigned[ranks.rank]
    return dataclasses.replace(ranks, local_rank=local_rank, local_world_size=local_world_size, host_sizes=sizes)


@contextmanager
def _tell_torchrec(ranks: _Ranks) -> Iterator[None]:
    """TorchRec reads from the environment how many ranks a host has: the same number on all ranks, or it is lost."""
    block = math.gcd(*ranks.host_sizes)
    told = {"LOCAL_RANK": str(ranks.local_rank % block), "LOCAL_WORLD_SIZE": str(block)}
    before = {name: os.environ.get(name) for name in told}
    os.environ |= told
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read_count(name: str, least: int) -> int:
    text = os.environ[name]
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise LaunchError(f"{name}={text}: expected a whole number of {least} or more. Start with torchrun.")
    return int(text)


def _pick_device(ranks: _Ranks) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = ranks.local_rank
    if len(set(ranks.host_sizes)) > 1:
        raise LaunchError(
            f"hosts of {', '.join(map(str, ranks.host_sizes))} ranks: with GPUs, expected as many on each host. Start "
            "the same --nproc_per_node everywhere."
        ).raised_everywhere()
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} has no GPU: this host has {torch.cuda.device_count()}. "
            "Start at most that many processes per host (--nproc_per_node)."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _arrange_threads(local_rank: int, local_world_size: int) -> str:
    """The ranks of a host share its cores, a thread for each, unless OMP_NUM_THREADS says otherwise. Says which.

    A CPU quota counts as its whole cores. If memory is nearer to some cores than to others, each rank keeps to its
    share, and its tables to memory there.
    """
    cores = allowed_cores()
    share = share_of_rank(cores, local_rank, local_world_size)
    nodes = len({core.node for core in cores})
    binds = local_world_size > 1 and nodes > 1 and not is_bound_already()
    if binds:
        os.sched_setaffinity(0, {core.cpu for core in share})
    physical = len({core.physical for core in share})
    chosen = chosen_threads()
    own = usable_cores(physical if len(cores) >= local_world_size else 1, local_world_size)
    torch.set_num_threads(chosen or max(1, own))
    why = "" if chosen is None else " (OMP_NUM_THREADS)"
    quota = cpu_quota()
    limit = "" if quota is None or quota >= len(cores) else f" with a CPU quota of {quota:.3g}"
    bound = f", each rank on its share of {nodes} NUMA nodes" if binds else ""
    return f"{count(torch.get_num_threads(), 'thread')} a rank{why} on {count(len(cores), 'core')}{limit}{bound}"


def _open_store(ranks: _Ranks) -> dist.Store:
    """The store at which the launcher's ranks meet; a private one for a process that no launcher started."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        return open_launch_store(ranks.rank, ranks.world_size)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise LaunchError(
                f"MASTER_PORT: {address} is in use by another process. Choose a free port, or start with torchrun, "
                "which finds one."
            ) from None
        raise LaunchError(f"no process group at {address}: {str(error).splitlines()[0]}") from None
    except ValueError as error:
        raise LaunchError(f"no process group: {error}. Start with torchrun, which sets what is missing.") from None


def _link_ranks(ranks: _Ranks, device: torch.device) -> str:
    """Has CPU ranks that are all on this host exchange in memory; what tensors travel by now. Collective."""
    backend = dist.get_backend()
    if device.type != "cpu" or ranks.world_size == 1 or ranks.world_size != ranks.local_world_size:
        return backend
    why = exchange_in_memory(cast(dist.ProcessGroup, dist.group.WORLD))
    return f"{backend} and shared memory" if why is None else f"{backend} without shared memory ({why})"


def on_main_rank(runtime: Runtime, action: Callable[[], T]) -> T:
    """Calls `action` on rank 0 and gives its result, or raises its DlrmError, on every rank.

    Collective. The result must be picklable.
    """
    outcome: list[T | DlrmError | None] = [None]
    if runtime.is_main:
        try:
            outcome[0] = action()
        except DlrmError as error:
            outcome[0] = error
    if runtime.world_size > 1:
        dist.broadcast_object_list(outcome, src=0, group=runtime.control_group)
    if isinstance(outcome[0], DlrmError):
        raise outcome[0].raised_everywhere()
    return outcome[0]  # type: ignore[return-value]


def on_every_rank(runtime: Runtime, action: Callable[[], T]) -> T:
    """Calls `action` on every rank; if it raises a DlrmError anywhere, all ranks raise the lowest rank's.

    Collective.
    """
    error: DlrmError | None = None
    result: T | None = None
    try:
        result = action()
    except DlrmError as caught:
        error = caught
    errors: list[DlrmError | None] = [error]
    if runtime.world_size > 1:
        errors = [None] * runtime.world_size
        dist.all_gather_object(errors, error, group=runtime.control_group)
    for first in errors:
        if first is not None:
            raise first.raised_everywhere()
    return result  # type: ignore[return-value]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose (and rank, epoch, table, ...) of a run; any two differ for all practical ends."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def peak_memory_gib(device: torch.device) -> float:
    """Peak so far, in GiB: of device memory on a GPU, of this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
