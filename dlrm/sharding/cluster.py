"""The ranks that a plan is for, and their memory and network."""

from dataclasses import dataclass

import torch
from torchrec.distributed.planner import Topology

from dlrm.config.config import ShardingConfig
from dlrm.ranks.runtime import Runtime

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """Ranks, and what tables may take on each.

    Attributes:
        device: `cuda` or `cpu`.
        world_size: ranks in all.
        local_world_size: ranks of a host.
        table_bytes: memory of a rank for tables: of its GPU, or on a CPU of its share of the host. Less the reserve.
        host_bytes: beside a GPU, a rank's share of the host's memory, for tables that do not fit the GPU.
        reserved_share: of the memory, kept for dense parts, activations and batches.
        intra_host_bandwidth: between two ranks of a host, in GiB/s.
        inter_host_bandwidth: between two hosts, in GiB/s.
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
        """Ranks as this one, with its GPU or its share of the host's memory, unless `config` says otherwise."""
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
        """As TorchRec's planner takes it."""
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
