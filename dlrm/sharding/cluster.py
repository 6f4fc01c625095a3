"""The ranks that a plan is for, with their memory and network."""

from dataclasses import dataclass

import torch
from torchrec.distributed.planner import Topology

from dlrm.config.config import ShardingConfig
from dlrm.ranks.runtime import Runtime
from dlrm.sharding.placement import GIB


@dataclass(frozen=True)
class Cluster:
    """Ranks, and the memory that tables may take on each.

    Attributes:
        device: `cuda` or `cpu`.
        world_size: number of all ranks.
        local_world_size: number of ranks of a host.
        table_bytes: a rank's memory for tables, without the reserve: its GPU's, or on a CPU its share of the host's.
        host_bytes: beside a GPU, a rank's share of the host's memory, for tables that do not fit the GPU; else 0.
        reserved_share: share of the memory that is kept for dense parts, activations and batches.
        intra_host_bandwidth: bandwidth between two ranks of a host, in GiB/s.
        inter_host_bandwidth: bandwidth between two hosts, in GiB/s.
    """

    device: str
    world_size: int
    local_world_size: int
    table_bytes: int
    host_bytes: int = 0
    reserved_share: float = ShardingConfig.reserved_memory_share
    intra_host_bandwidth: float = ShardingConfig.intra_host_bandwidth
    inter_host_bandwidth: float = ShardingConfig.inter_host_bandwidth

    @staticmethod
    def detect(runtime: Runtime, config: ShardingConfig) -> "Cluster":
        """A cluster of ranks like this one. `config` overrides the memory of its GPU, or its share of the host's."""
        host_bytes = runtime.host_memory_bytes // runtime.local_world_size
        on_gpu = runtime.device.type == "cuda"
        device_bytes = torch.cuda.get_device_properties(runtime.device).total_memory if on_gpu else host_bytes
        if config.device_memory_gib is not None:
            device_bytes = int(config.device_memory_gib * GIB)
        free_share = 1 - config.reserved_memory_share
        return Cluster(
            runtime.device.type,
            runtime.world_size,
            runtime.block_size,
            int(device_bytes * free_share),
            int(host_bytes * free_share) if on_gpu else 0,
            config.reserved_memory_share,
            config.intra_host_bandwidth,
            config.inter_host_bandwidth,
        )

    def topology(self) -> Topology:
        """The cluster in the form that TorchRec's planner takes."""
        on_gpu = self.device == "cuda"
        return Topology(
            world_size=self.world_size,
            local_world_size=self.local_world_size,
            compute_device=self.device,
            hbm_cap=self.table_bytes if on_gpu else 0,
            ddr_cap=self.host_bytes if on_gpu else self.table_bytes,
            intra_host_bw=self.intra_host_bandwidth * GIB / 1000,  # bytes per millisecond
            inter_host_bw=self.inter_host_bandwidth * GIB / 1000,
        )
