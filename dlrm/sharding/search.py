"""TorchRec's planner over a model and a cluster: the search for a plan, and the plan as a `Placement`."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from dlrm.config.table_rules import ROW_SPLITS, TableConstraint
from dlrm.errors import DoesNotFitError, PlanError
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.constraints import Enumerator, PinnedPartitioner, to_parameter_constraints
from dlrm.sharding.placement import GIB, Placement, TablePlacement
from dlrm.sharding.sharder import TableSharder
from dlrm.sharding.shortfall import describe_shortfall, find_shortage

_BYTES_PER_FLOAT = 4
_TOO_LITTLE_MEMORY = (
    PlannerErrorType.INSUFFICIENT_STORAGE,  # all ranks together have too little
    PlannerErrorType.STRICT_CONSTRAINTS,  # together they have enough, but no rank has room for some table
)


@dataclass(frozen=True)
class PlanSearch:
    """Everything that a plan depends on, except the cluster.

    Attributes:
        model: its parameters carry their fused optimizers; they need no memory (torch's meta device).
        sharder: how TorchRec shards the tables.
        batch_size: samples of a rank in a step.
        hotness: ids per sample of each table's feature, in the order of TABLE_NAMES.
        constraints: rules of the tables that have one, by name.
        sharding_types: types to choose from, for tables without a rule.
    """

    model: nn.Module
    sharder: TableSharder
    batch_size: int
    hotness: Sequence[int]
    constraints: Mapping[str, TableConstraint]
    sharding_types: Sequence[str]

    def plan(self, cluster: Cluster) -> ShardingPlan:
        """Chooses a place for each table.

        Not collective: rank 0 plans, and broadcasts (see `runtime.on_main_rank`).

        Raises:
            DoesNotFitError: if the tables need more memory than there is, with the shortfall in GiB per rank.
            PlanError: if a constraint can't be met.
        """
        with _quiet_planner():
            try:
                plan = self._choose(cluster)
            except PlannerError as error:
                raise self._explain(error, cluster) from None
        assert sum(len(cast(EmbeddingModuleShardingPlan, part)) for part in plan.plan.values()) == len(self._tables())
        return plan

    def fits(self, cluster: Cluster) -> bool:
        """Whether `plan` would find a place for each table. Takes as long as one plan."""
        try:
            with _quiet_planner():
                return self._has_room(cluster)
        except PlanError:
            return False

    def _tables(self) -> dict[str, nn.Parameter]:
        return {name.split(".")[-2]: p for name, p in self.model.named_parameters() if ".embedding_bags." in name}

    def _has_room(self, cluster: Cluster) -> bool:
        """Whether there is memory enough for some plan.

        Raises:
            PlanError: if the planner fails for another reason.
        """
        try:
            self._choose(cluster)
        except PlannerError:
            return False
        return True

    def _choose(self, cluster: Cluster) -> ShardingPlan:
        """The planner's choice.

        Raises:
            PlannerError: if there is too little memory.
            PlanError: if a constraint can't be met, or the planner fails for another reason.
        """
        constraints = self._parameter_constraints(cluster)
        # On a CPU a split by rows is the slower way, for tables that fit in no other.
        if cluster.device == "cpu":
            with suppress(PlannerError):
                whole_rows = [kind for kind in self.sharding_types if kind not in ROW_SPLITS]
                return self._choose_among(whole_rows, cluster, constraints)
        return self._choose_among(self.sharding_types, cluster, constraints)

    def _parameter_constraints(self, cluster: Cluster) -> dict[str, ParameterConstraints]:
        hotness = dict(zip(TABLE_NAMES, self.hotness, strict=True))
        return {
            name: to_parameter_constraints(
                name, self.constraints.get(name, TableConstraint()), tuple(table.shape), hotness[name], cluster
            )
            for name, table in self._tables().items()
        }

    def _choose_among(
        self, sharding_types: Sequence[str], cluster: Cluster, constraints: dict[str, ParameterConstraints]
    ) -> ShardingPlan:
        topology = cluster.topology()
        pinned = {name: rule.ranks for name, rule in self.constraints.items() if rule.ranks is not None}
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=self.batch_size,
            enumerator=Enumerator(topology, self.batch_size, constraints, sharding_types),
            storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
            constraints=constraints,
            partitioner=PinnedPartitioner(pinned),
        )
        try:
            return planner.plan(self.model, [self.sharder])  # type: ignore[list-item]
        except PlannerError as error:
            if error.error_type in _TOO_LITTLE_MEMORY:
                raise
            raise PlanError(f"no sharding plan: {_quote(error)}") from None

    def _explain(self, error: PlannerError, cluster: Cluster) -> PlanError:
        """The error to show if there is too little memory: what is missing, and what would help."""
        shortage = find_shortage(cluster, self._has_room)
        if shortage is None:
            return PlanError(f"no sharding plan, however much memory there is: {_quote(error)}")
        is_batch = self.batch_size > 1 and replace(self, batch_size=1)._has_room(cluster)
        refusal = describe_shortfall(
            self._tables().values(),
            cluster,
            shortage,
            self.batch_size if is_batch else None,
            is_constrained=bool(self.constraints),
        )
        return DoesNotFitError(refusal, shortage.missing_gib)


def _quote(error: PlannerError) -> str:
    """The first line of the planner's message, or its kind if it has none."""
    return f"TorchRec's planner says: {(str(error).strip().splitlines() or [error.error_type.value])[0]}"


@contextmanager
def _quiet_planner() -> Iterator[None]:
    """Silences TorchRec's planner, which warns of what we decide on purpose: that a topology is built by hand."""
    loggers = [logging.getLogger(name) for name in ("torchrec", None)]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def describe_plan(
    plan: ShardingPlan, model: nn.Module, world_size: int, state_floats: Callable[[str, int], float]
) -> Placement:
    """The plan as a `Placement`.

    Args:
        state_floats: optimizer state of a table's row, in floats, by the table's name and the weights of the row.
    """
    tables = []
    for path, module_plan in plan.plan.items():
        bags = cast(EmbeddingBagCollection, model.get_submodule(path)).embedding_bags
        for name, placed in cast(EmbeddingModuleShardingPlan, module_plan).items():
            weight = cast(torch.Tensor, bags.get_submodule(name).weight)
            tables.append(_describe_table(name, weight, placed, world_size, state_floats))
    return Placement(world_size, tuple(tables))


def _describe_table(
    name: str,
    weight: torch.Tensor,
    placed: ParameterSharding,
    world_size: int,
    state_floats: Callable[[str, int], float],
) -> TablePlacement:
    rows, dim = weight.shape
    if placed.sharding_spec is None:  # data parallel: whole on every rank
        ranks = tuple(range(world_size))
        shards = [(rank, rows, dim) for rank in ranks]
    else:
        pieces = placed.sharding_spec.shards  # type: ignore[attr-defined]
        shards = [(piece.placement.rank(), *piece.shard_sizes) for piece in pieces]
        ranks = tuple(sorted({rank for rank, *_ in shards}))
    weight_bytes = weight.element_size()

    def gib(shard_rows: int, shard_dim: int) -> float:
        return shard_rows * (shard_dim * weight_bytes + state_floats(name, shard_dim) * _BYTES_PER_FLOAT) / GIB

    by_rank = tuple(sum(gib(*size) for owner, *size in shards if owner == rank) for rank in ranks)
    weights_gib = rows * dim * weight_bytes / GIB
    optimizer_gib = rows * state_floats(name, dim) * _BYTES_PER_FLOAT / GIB
    return TablePlacement(
        name, rows, dim, weights_gib, optimizer_gib, placed.sharding_type, placed.compute_kernel, ranks, by_rank
    )
