"""Where a run's tables go on a cluster that is not available, and the smallest cluster that they fit."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from dlrm.assembly.build import build_model, build_search
from dlrm.config.config import Config
from dlrm.cost.hardware import ClusterShape, Hardware
from dlrm.cost.optimizer_state import table_state_floats
from dlrm.loader.run_data import hotness_of
from dlrm.ranks.runtime import Runtime
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.placement import Placement
from dlrm.sharding.search import describe_plan

MOST_SEARCHED_RANKS = 256
"""Ranks at which the search for a cluster ends: for more, TorchRec's planner takes minutes."""


def cluster_of(config: Config, shape: ClusterShape, hardware: Hardware) -> Cluster:
    """The cluster as `Cluster.detect` would find it there, so that the plan is the one that training makes."""
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


class ClusterSearch:
    """A run's model, without memory for its parameters, that can be placed on clusters of any number of hosts."""

    def __init__(self, config: Config, shape: ClusterShape, hardware: Callable[[ClusterShape], Hardware]) -> None:
        """Builds the model.

        Args:
            shape: the cluster that was asked for.
            hardware: what a rank of a cluster has.

        Raises:
            PlanError: if a rule, or the optimizer, makes every plan impossible.
        """
        self._config = config
        self._shape = shape
        self._hardware = hardware
        # Neither the seed nor the execution of layers changes where tables go.
        training = replace(config.training, seed=0, dense_execution="eager")
        runtime = Runtime(0, 0, shape.world_size, shape.devices_per_host, torch.device("meta"))
        with runtime.device:
            self._model = build_model(replace(config, training=training), runtime)
        self._search = build_search(config, self._model, hotness_of(config), hardware(shape).device)

    def _cluster(self, hosts: int) -> Cluster:
        shape = replace(self._shape, hosts=hosts)
        return cluster_of(self._config, shape, self._hardware(shape))

    def place(self) -> Placement:
        """The plan on the cluster that was asked for.

        Raises:
            DoesNotFitError: if the tables need more memory than there is.
            PlanError: if a rule can't be met.
        """
        cluster = self._cluster(self._shape.hosts)
        plan = self._search.plan(cluster)
        return describe_plan(plan, self._model, cluster.world_size, partial(table_state_floats, self._config))

    def find_smallest(self) -> ClusterShape | None:
        """The cluster with the fewest hosts, more than were asked for, that has a plan.

        Searches up to MOST_SEARCHED_RANKS ranks, or twice the ranks that were asked for.

        Returns:
            None if none of these clusters has a plan.
        """
        most = max(MOST_SEARCHED_RANKS, 2 * self._shape.world_size) // self._shape.devices_per_host
        hosts = fewest(
            lambda hosts: self._search.fits(self._cluster(hosts)),
            max(self._shape.hosts + 1, self._least_hosts()),
            most,
        )
        return None if hosts is None else replace(self._shape, hosts=hosts)

    def _least_hosts(self) -> int:
        """Hosts whose memory, taken together, just holds the weights and optimizer state."""
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
    """The smallest number from `least` to `most` that fits; None if none does.

    Assumes that all numbers above one that fits do fit too. Tries `least`, then doubles the step until a number fits,
    then bisects.
    """
    low, high = least - 1, least  # `low` never fits
    while high <= most and not fits(high):
        low, high = high, min(2 * high - least + 1, max(most, high + 1))
    if high > most:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
