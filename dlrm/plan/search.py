"""TorchRec's planner for a cluster that is not at hand, and the search for one that is large enough."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from dlrm.assembly.build import build_model, fits_run, plan_run
from dlrm.config.config import Config
from dlrm.cost.hardware import ClusterShape, Hardware
from dlrm.cost.optimizer_state import table_state_floats
from dlrm.loader.run_data import hotness_of
from dlrm.ranks.runtime import Runtime
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.plan import Placement, describe_plan

MOST_SEARCHED_RANKS = 256
"""Of the search for a cluster: TorchRec's planner takes minutes for more."""


def cluster_of(config: Config, shape: ClusterShape, hardware: Hardware) -> Cluster:
    """As `Cluster.detect` would find it there, so that the plan is the one that training with these flags makes."""
    sharding = config.sharding
    free_share = 1 - sharding.reserved_memory_share
    on_gpu = hardware.device == "cuda"
    host_bytes = hardware.host_memory_bytes / shape.devices_per_host
    return Cluster(
        hardware.device,
        shape.world_size,
        shape.devices_per_host,
        int(hardware.memory_bytes * free_share),
        int(host_bytes * free_share) if on_gpu else 0,
        sharding.reserved_memory_share,
        sharding.intra_host_bandwidth,
        sharding.inter_host_bandwidth,
    )


class Placing:
    """A run's model, without memory for its parameters, to be placed on one cluster or another."""

    def __init__(self, config: Config, shape: ClusterShape, hardware: Callable[[ClusterShape], Hardware]) -> None:
        """Builds the model. `hardware`: what a rank of a cluster has."""
        self._config = config
        self._shape = shape
        self._hardware = hardware
        self._hotness = hotness_of(config)
        # Neither the seed nor how layers run changes where tables go.
        training = replace(config.training, seed=0, dense_execution="eager")
        runtime = Runtime(0, 0, shape.world_size, shape.devices_per_host, torch.device("meta"))
        with runtime.device:
            self._model = build_model(replace(config, training=training), runtime)

    def _cluster(self, hosts: int) -> Cluster:
        shape = replace(self._shape, hosts=hosts)
        return cluster_of(self._config, shape, self._hardware(shape))

    def place(self) -> Placement:
        """The plan.

        Raises:
            DoesNotFitError: if the tables need more memory than there is.
            PlanError: if a rule or the optimizer asks for what can't be had.
        """
        cluster = self._cluster(self._shape.hosts)
        plan = plan_run(self._config, cluster, self._model, self._hotness)
        return describe_plan(plan, self._model, cluster.world_size, partial(table_state_floats, self._config))

    def find_smallest(self) -> ClusterShape | None:
        """The fewest hosts of these devices that a plan exists for, more than there are; None where there is none of up
        to MOST_SEARCHED_RANKS ranks, or twice the ranks that there are."""
        most = max(MOST_SEARCHED_RANKS, 2 * self._shape.world_size) // self._shape.devices_per_host
        hosts = fewest(
            lambda hosts: fits_run(self._config, self._cluster(hosts), self._model, self._hotness),
            max(self._shape.hosts + 1, self._least_hosts()),
            most,
        )
        return None if hosts is None else replace(self._shape, hosts=hosts)

    def _least_hosts(self) -> int:
        """Whose memory, all of it together, holds the weights and optimizer state."""
        model = self._config.model
        dim = model.embedding_dim
        needed = sum(
            4 * rows * (dim + table_state_floats(self._config, name, dim))
            for name, rows in zip(TABLE_NAMES, model.table_rows, strict=True)
        )
        cluster = self._cluster(self._shape.hosts)
        of_host = self._shape.devices_per_host * max(1, cluster.table_bytes + cluster.host_bytes)
        return max(1, needed // of_host)


def fewest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest number from `least` to `most` that fits, where all above one that fits do too; None if none does.

    Tries `least`, then in steps that double, then halves what is between.
    """
    low, high = least - 1, least  # low does not fit
    while high <= most and not fits(high):
        low, high = high, min(2 * high - least + 1, max(most, high + 1))
    if high > most:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
