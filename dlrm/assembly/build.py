"""A run's model and plan, before any of it is sharded."""

from collections.abc import Sequence

import numpy as np
import torch
from torchrec.distributed.types import ShardingPlan

from dlrm.assembly.dense_execution import set_dense_execution
from dlrm.assembly.optimizers import allowed_sharding_types, fuse_table_optimizer
from dlrm.config.config import Config
from dlrm.loader.dense_statistics import DenseStatistics
from dlrm.model.dense import ReluMLP
from dlrm.model.dlrm import DLRM, DLRMTrain
from dlrm.ranks.runtime import Runtime, derive_seed
from dlrm.schema.criteo import NUM_INTEGER_FEATURES
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.constraints import constraints_of
from dlrm.sharding.search import PlanSearch
from dlrm.sharding.sharder import TableSharder

ROWS_AT_ONCE = 16384
"""On a CPU. A larger batch needs no more memory for activations than this one, and pieces cost some five per cent."""


def build_model(config: Config, runtime: Runtime, statistics: DenseStatistics | None = None) -> DLRMTrain:
    """The model before sharding: dense parts on the device, tables without memory, their optimizer attached.

    Args:
        statistics: of the integers; None if the model needs none, or a checkpoint is about to bring them.
    """
    assert config.training.seed is not None
    if statistics is None and config.model.needs_dense_statistics:
        statistics = DenseStatistics.of(np.empty((0, NUM_INTEGER_FEATURES), np.float32), config.model.dense_buckets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.training.seed, "dense"))
        model = DLRM(config.model, torch.device("meta"), statistics)
    for name, part in model.named_children():
        if name != "embedding_bag_collection":
            part.to(runtime.device)
    fuse_table_optimizer(model.embedding_bag_collection, config.optimizer, config.frozen)
    for part in model.modules():
        if isinstance(part, ReluMLP):
            part.through = config.training.integers
    autocast = runtime.device.type if config.training.activations == "bf16" else None
    train = DLRMTrain(model, runtime.world_size, autocast, rows_at_once(config, runtime.device))
    set_dense_execution(train, config.training.dense_execution, config.data.batch_size)
    return train


def rows_at_once(config: Config, device: torch.device) -> int | None:
    """`rows_at_once` for DLRMTrain: ROWS_AT_ONCE if some batch on a CPU is larger, else None."""
    largest = config.data.largest_batch_size
    is_bounded = device.type == "cpu" and config.training.dense_execution == "eager" and largest > ROWS_AT_ONCE
    return ROWS_AT_ONCE if is_bounded else None


def make_sharder(config: Config) -> TableSharder:
    """How the run's tables are sharded."""
    sharding, prefetches = config.sharding, config.training.pipeline == "prefetch"
    return TableSharder(
        sharding.forward_comm_precision,
        sharding.backward_comm_precision,
        batch_size=config.data.batch_size,
        prefetches=prefetches,
        activations=config.training.activations,
    )


def build_search(config: Config, model: DLRMTrain, hotness: Sequence[int], device: str) -> PlanSearch:
    """The search for a place for the run's tables.

    Args:
        hotness: ids per sample of each feature.
        device: `cuda` or `cpu`, of the ranks that the search is for.

    Raises:
        PlanError: if no plan satisfies a rule, or the optimizer.
    """
    constraints = constraints_of(config.sharding, config.model)
    return PlanSearch(
        model,
        make_sharder(config),
        config.data.largest_batch_size,
        hotness,
        constraints,
        allowed_sharding_types(config.optimizer, constraints, device, config.frozen),
    )


def plan_run(config: Config, cluster: Cluster, model: DLRMTrain, hotness: Sequence[int]) -> ShardingPlan:
    """Plans on which rank each table goes, and in which sharding.

    Args:
        hotness: ids per sample of each feature.

    Raises:
        DoesNotFitError: if they do not fit.
        PlanError: if no plan satisfies a rule, or the optimizer.
    """
    return build_search(config, model, hotness, cluster.device).plan(cluster)
