"""Resources of a job, checked: hosts and processes; cores, GPUs, memory and mounts of a host."""

import re
from dataclasses import dataclass
from pathlib import Path

from torchx import specs
from torchx.util.types import to_dict

from dlrm.config.config import MOST_RANKS, Config
from dlrm.cost.optimizer_state import table_state_floats
from dlrm.errors import LaunchError
from dlrm.schema.criteo import TABLE_NAMES

GIB = 2**30
_CORES_PER_PROCESS = {"cpu": 2, "cuda": 8}
_GIB_PER_PROCESS = {"cpu": 1.5, "cuda": 6.0}
"""Libraries, batches, activations; beside a GPU its context and page-locked batches."""
_GPU_GIB = 40.0
"""The smallest of `dlrm plan`'s kinds."""
_HEADROOM = 1.2
_BYTES_PER_FLOAT = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,14}")
_RANGES = {
    "gpu": (0, 64),
    "cpu": (0, 4096),
    "memory_gib": (0, 2**16),
    "max_restarts": (0, 1000),
    "max_retries": (0, 1000),
    "rdzv_port": (1, 65_535),
}


def check_options(name: str, interface: str | None, **numbers: int) -> None:
    """Refuses options of the component that no job can have.

    Raises:
        LaunchError: naming the option.
    """
    if not _NAME.fullmatch(name):
        raise LaunchError(f"--name {name!r}: expected 1 to 40 letters, digits, - and _, a letter or digit first")
    if interface is not None and not _INTERFACE.fullmatch(interface):
        raise LaunchError(f"--interface {interface!r}: expected the name of one network interface, as in eth0")
    for option, number in numbers.items():
        least, most = _RANGES[option]
        if not least <= number <= most:
            raise LaunchError(f"--{option} {number}: expected {least} to {most}")


def find_host(name: str) -> specs.Resource:
    """A named resource of torchx.

    Raises:
        LaunchError: if there is none of that name.
    """
    try:
        found = specs.named_resources[name]
    except KeyError:
        found = specs.NULL_RESOURCE
    if found.cpu < 1:
        raise LaunchError(
            f"-h {name}: no named resource of torchx. Expected one as aws_p4d.24xlarge, or --gpu and --cpu"
        )
    return found


def read_mounts(options: list[str]) -> list[specs.BindMount | specs.VolumeMount | specs.DeviceMount]:
    """The mounts of `--mounts`, which stand between commas.

    Raises:
        LaunchError: if it says no mount.
    """
    try:
        return specs.parse_mounts(options)
    except (KeyError, ValueError) as error:
        why = f"no {error.args[0]}" if error.args[0] in ("src", "dst") else error.args[0]
        raise LaunchError(
            f"--mounts {','.join(options)}: {why}. Expected type=bind,src=/data,dst=/data,readonly"
        ) from None


def read_env(text: str) -> dict[str, str]:
    """The variables of `--env`.

    Raises:
        LaunchError: if it says no variables.
    """
    try:
        variables = to_dict(text)
    except ValueError:
        variables = {"": text}
    if not all(map(str.isidentifier, variables)):
        raise LaunchError(f"--env {text}: expected NAME=VALUE,NAME=VALUE")
    return variables


@dataclass(frozen=True)
class Shape:
    """Hosts and processes of a job. With `min_hosts` below `hosts` it continues when it loses some."""

    min_hosts: int
    hosts: int
    processes_per_host: int

    @property
    def nnodes(self) -> str:
        """The number of hosts as torchrun takes it."""
        return str(self.hosts) if self.min_hosts == self.hosts else f"{self.min_hosts}:{self.hosts}"


def parse_shape(text: str, gpus_per_host: int) -> Shape:
    """Reads `-j`: `2x8` is 2 hosts of 8 processes, `2` is 2 hosts with a process for each GPU, `1:2x8` 1 to 2 hosts.

    Raises:
        LaunchError: if it is none of these, more ranks than can be planned, or a host has GPUs, and not as many as
            processes.
    """
    match = re.fullmatch(r"(?:([1-9]\d{0,8}):)?([1-9]\d{0,8})(?:x([1-9]\d{0,8}))?", text, re.ASCII)
    if match is None:
        raise LaunchError(
            f"-j {text[:60]}: expected HOSTSxPROCESSES, as in 2x8; MIN:MAXxPROCESSES, as in 1:2x8; or HOSTS"
        )
    hosts = int(match[2])
    shape = Shape(int(match[1] or hosts), hosts, int(match[3] or gpus_per_host or 1))
    if shape.min_hosts > shape.hosts:
        raise LaunchError(f"-j {text}: at least {shape.min_hosts} hosts, at most {shape.hosts}. Swap them.")
    if (ranks := shape.hosts * shape.processes_per_host) > MOST_RANKS:
        raise LaunchError(f"-j {text}: {ranks:,} processes, expected {MOST_RANKS:,} or fewer")
    if gpus_per_host and shape.processes_per_host != gpus_per_host:
        raise LaunchError(
            f"-j {text} with {gpus_per_host} GPUs a host: expected a process for each GPU, -j {hosts}x{gpus_per_host}"
        )
    return shape


def count_cores(processes: int, gpus_per_host: int) -> int:
    """Cores of a host, where none are asked for."""
    return processes * _CORES_PER_PROCESS["cuda" if gpus_per_host else "cpu"]


def estimate_host_gib(config: Config, shape: Shape, gpus_per_host: int) -> int:
    """Memory of a host, where none is asked for: tables, a copy for checkpoints, rows, and what processes take.

    Tables are spread over all hosts; the smallest number of hosts that continues must be enough. Beside GPUs, it is the
    tables that these can't hold, with --device_memory_gib each, or 40 GiB.

    Raises:
        LaunchError: if rows are loaded into memory and can't be seen from here.
    """
    device = "cuda" if gpus_per_host else "cpu"
    dim = config.model.embedding_dim
    tables = sum(
        rows * (dim + table_state_floats(config, name, dim)) * _BYTES_PER_FLOAT
        for name, rows in zip(TABLE_NAMES, config.model.table_rows, strict=True)
    )
    has_copy = config.checkpoint.checkpoint_every != "never" and config.checkpoint.checkpoint_mode == "async"
    in_gpus = shape.min_hosts * gpus_per_host * (config.sharding.device_memory_gib or _GPU_GIB) * GIB
    on_hosts = max(0.0, tables - in_gpus * (1 - config.sharding.reserved_memory_share))
    spread = on_hosts + tables * has_copy + _bytes_of_rows(config)
    gib = spread / shape.min_hosts / GIB + shape.processes_per_host * _GIB_PER_PROCESS[device]
    return int(gib * _HEADROOM) + 1


def _bytes_of_rows(config: Config) -> int:
    folders = (config.data.in_memory_binary_criteo_path, config.data.synthetic_multi_hot_criteo_path)
    return sum(_bytes_in(folder) for folder in folders if folder is not None and not config.data.mmap_mode)


def _bytes_in(folder: str) -> int:
    try:
        sizes = [path.stat().st_size for path in Path(folder).iterdir() if path.suffix in (".npy", ".npz")]
    except OSError:
        sizes = []
    if not sizes:
        raise LaunchError(
            f"{folder}: its rows can't be seen from here, so their memory is not known. Give --memory_gib, "
            "or --mmap_mode after the --."
        )
    return sum(sizes)
