"""What a host of a job needs: processes, cores, GPUs, memory."""

import re
from dataclasses import dataclass
from pathlib import Path

from dlrm.config import Config
from dlrm.errors import LaunchError

GIB = 2**30
_CORES_PER_PROCESS = {"cpu": 2, "cuda": 8}
_GIB_PER_PROCESS = {"cpu": 1.5, "cuda": 6.0}
"""Libraries, batches, activations; beside a GPU its context and page-locked batches."""
_GPU_GIB = 40.0
"""The smallest of `dlrm plan`'s kinds."""
_HEADROOM = 1.2
_BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class Shape:
    """Hosts and processes of a job. With `min_hosts` below `hosts` it goes on when it loses some."""

    min_hosts: int
    hosts: int
    processes_per_host: int

    @property
    def nnodes(self) -> str:
        """As torchrun takes it."""
        return str(self.hosts) if self.min_hosts == self.hosts else f"{self.min_hosts}:{self.hosts}"


def parse_shape(text: str, gpus_per_host: int) -> Shape:
    """Reads `-j`: `2x8` is 2 hosts of 8 processes, `2` is 2 hosts with a process for each GPU, `1:2x8` 1 to 2 hosts.

    Raises:
        LaunchError: if it is none of these, or a host has GPUs, and not as many as processes.
    """
    match = re.fullmatch(r"(?:([1-9]\d*):)?([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise LaunchError(f"-j {text}: expected HOSTSxPROCESSES, as in 2x8; MIN:MAXxPROCESSES, as in 1:2x8; or HOSTS")
    hosts = int(match[2])
    shape = Shape(int(match[1] or hosts), hosts, int(match[3] or gpus_per_host or 1))
    if shape.min_hosts > shape.hosts:
        raise LaunchError(f"-j {text}: at least {shape.min_hosts} hosts, at most {shape.hosts}. Swap them.")
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

    Tables are spread over all hosts; the smallest number of hosts that goes on must be enough. Beside GPUs, it is the
    tables that these can't hold, with --device_memory_gib each, or 40 GiB.

    Raises:
        LaunchError: if the rows are loaded into memory and can't be seen from here.
    """
    device = "cuda" if gpus_per_host else "cpu"
    dim = config.model.embedding_dim
    floats_per_row = dim + config.optimizer.table_state_floats(dim)
    tables = sum(config.model.table_rows) * floats_per_row * _BYTES_PER_FLOAT
    has_copy = config.checkpoint.checkpoint_every != "never" and config.checkpoint.checkpoint_mode == "async"
    in_gpus = shape.min_hosts * gpus_per_host * (config.sharding.device_memory_gib or _GPU_GIB) * GIB
    on_hosts = max(0.0, tables - in_gpus * (1 - config.sharding.reserved_memory_share))
    spread = on_hosts + tables * has_copy + _bytes_of_rows(config)
    gib = spread / shape.min_hosts / GIB + shape.processes_per_host * _GIB_PER_PROCESS[device]
    return int(gib * _HEADROOM) + 1


def _bytes_of_rows(config: Config) -> int:
    folders = (config.data.in_memory_binary_criteo_path, config.data.synthetic_multi_hot_criteo_path)
    total = 0
    for folder in folders if not config.data.mmap_mode else ():
        if folder is None:
            continue
        if not Path(folder).is_dir():
            raise LaunchError(
                f"{folder}: can't be seen from here, so the memory that its rows take is not known. Give --memory_gib, "
                "or --mmap_mode after the --."
            )
        total += sum(path.stat().st_size for path in Path(folder).iterdir() if path.suffix in (".npy", ".npz"))
    return total
