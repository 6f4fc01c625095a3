"""Where each embedding table lives: TorchRec's planner over a cluster, to be printed and saved."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from dlrm.config.config import ModelConfig, ShardingConfig
from dlrm.config.frozen import large_tables
from dlrm.config.table_rules import ROW_SPLITS, TableConstraint, constraints_of_tables, parse_rules
from dlrm.errors import DoesNotFitError, PlanError
from dlrm.ranks.runtime import count
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.cluster import GIB, Cluster
from dlrm.sharding.constraints import Enumerator, PinnedPartitioner, to_parameter_constraints
from dlrm.sharding.sharder import TableSharder

_BYTES_PER_WEIGHT = 4
_PLENTY = 1 << 60
_OF_THE_HOST = " of the host"
_TOO_LITTLE_MEMORY = (
    PlannerErrorType.INSUFFICIENT_STORAGE,  # all ranks together
    PlannerErrorType.STRICT_CONSTRAINTS,  # enough in all, and no rank left with room for some table
)


@dataclass(frozen=True)
class TablePlacement:
    """One table: its size, and who holds which part in which way. GiB counts weights; `optimizer_gib` its state."""

    table: str
    rows: int
    dim: int
    gib: float
    optimizer_gib: float
    sharding: str
    kernel: str
    ranks: tuple[int, ...]
    gib_by_rank: tuple[float, ...]


@dataclass(frozen=True)
class Placement:
    """The plan as people and plan.json see it."""

    world_size: int
    tables: tuple[TablePlacement, ...]

    @property
    def gib_per_rank(self) -> list[float]:
        """Weights and optimizer state of tables, by rank."""
        return self._gib_per_rank_of(self.tables)

    def _gib_per_rank_of(self, tables: Iterable[TablePlacement]) -> list[float]:
        totals = [0.0] * self.world_size
        for table in tables:
            for rank, gib in zip(table.ranks, table.gib_by_rank, strict=True):
                totals[rank] += gib
        return totals

    def host_bytes(self, cluster: Cluster) -> int:
        """Most memory that tables take of a host, with optimizer state: all of them on a CPU, beside GPUs some."""
        on_host = (table for table in self.tables if cluster.device == "cpu" or "uvm" in table.kernel)
        totals = self._gib_per_rank_of(on_host)
        hosts = range(0, self.world_size, cluster.local_world_size)
        return int(max(sum(totals[first : first + cluster.local_world_size]) for first in hosts) * GIB)

    @property
    def gib(self) -> float:
        """Weights of all tables; the "collective size" of the public example's results table."""
        return sum(table.gib for table in self.tables)

    def to_json(self) -> dict[str, Any]:
        """For plan.json."""
        return {
            "world_size": self.world_size,
            "tables_gib": self.gib,
            "gib_per_rank": self.gib_per_rank,
            "tables": [asdict(table) for table in self.tables],
        }

    def to_text(self) -> str:
        """A line a table, then a line a rank."""
        head = ("table", "rows", "dim", "GiB", "sharding", "kernel", "ranks")
        lines = [
            (t.table, f"{t.rows:,}", str(t.dim), f"{t.gib:.4f}", t.sharding, t.kernel, _shorten(t.ranks))
            for t in self.tables
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        right = {1, 2, 3}
        text = [
            "  ".join(
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in [head, *lines]
        ]
        text += [f"rank {rank}: {gib:.4f} GiB with optimizer state" for rank, gib in enumerate(self.gib_per_rank)]
        return "\n".join(line.rstrip() for line in text)

    def summary(self) -> str:
        """One line."""
        kinds = sorted({f"{table.sharding}/{table.kernel}" for table in self.tables})
        most = max(self.gib_per_rank)
        weights = f"{len(self.tables)} tables, {self.gib:.2f} GiB of weights"
        return f"{weights}, {', '.join(kinds)}, at most {most:.2f} GiB a rank with optimizer state"


def constraints_of(sharding: ShardingConfig, model: ModelConfig) -> dict[str, TableConstraint]:
    """The rule of each table that has one.

    Raises:
        PlanError: if there is a rule of large tables, and no such table.
    """
    if sharding.table_constraints is None:
        return {}
    large = large_tables(model.table_rows, model.embedding_dim, sharding.large_table_gib)
    rules = parse_rules(sharding.table_constraints)
    if "large" in rules and not large:
        most = max(model.table_rows) * model.embedding_dim * _BYTES_PER_WEIGHT / GIB
        raise PlanError(
            f"--table_constraints: a rule of `large`, but no table has the {sharding.large_table_gib:g} GiB of "
            f"--large_table_gib; the largest has {most:.3g}. Give a smaller --large_table_gib, or drop the rule."
        )
    return constraints_of_tables(rules, large)


def plan_sharding(
    model: nn.Module,
    cluster: Cluster,
    sharder: TableSharder,
    batch_size: int,
    hotness: Sequence[int],
    constraints: Mapping[str, TableConstraint],
    sharding_types: Sequence[str],
) -> ShardingPlan:
    """Chooses a place for each table of `model`, whose parameters carry their fused optimizers.

    Not collective: rank 0 plans, and broadcasts (see `runtime.on_main_rank`).

    Args:
        batch_size: samples of a rank in a step.
        hotness: ids per sample of each table's feature.
        constraints: of the tables that have one.
        sharding_types: to choose from.

    Raises:
        DoesNotFitError: if the tables need more memory than there is, with the shortfall in GiB per rank.
        PlanError: if a constraint can't be met.
    """
    tables = _tables_of(model)
    search = _build_search(model, cluster, sharder, batch_size, hotness, constraints, sharding_types)
    with _quiet_planner():
        try:
            plan = search.plan(cluster)
        except PlannerError as error:
            shortage = _find_shortage(cluster, search.fits)
            if shortage is None:
                raise PlanError(f"no sharding plan, however much memory there is: {_first_line(error)}") from None
            is_batch = batch_size > 1 and replace(search, batch_size=1).fits(cluster)
            refusal = _describe_shortfall(
                list(tables.values()), cluster, shortage, batch_size if is_batch else None, bool(constraints)
            )
            raise DoesNotFitError(refusal, shortage.missing_gib) from None
    assert sum(len(cast(EmbeddingModuleShardingPlan, part)) for part in plan.plan.values()) == len(tables)
    return plan


def fits_sharding(
    model: nn.Module,
    cluster: Cluster,
    sharder: TableSharder,
    batch_size: int,
    hotness: Sequence[int],
    constraints: Mapping[str, TableConstraint],
    sharding_types: Sequence[str],
) -> bool:
    """Whether `plan_sharding` would find a place for each table; takes the time of one plan."""
    try:
        search = _build_search(model, cluster, sharder, batch_size, hotness, constraints, sharding_types)
        with _quiet_planner():
            return search.fits(cluster)
    except PlanError:
        return False


def _tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.split(".")[-2]: p for name, p in model.named_parameters() if ".embedding_bags." in name}


def _build_search(
    model: nn.Module,
    cluster: Cluster,
    sharder: TableSharder,
    batch_size: int,
    hotness: Sequence[int],
    constraints: Mapping[str, TableConstraint],
    sharding_types: Sequence[str],
) -> "_Search":
    hotness_of_table = dict(zip(TABLE_NAMES, hotness, strict=True))
    limits = {
        name: to_parameter_constraints(
            name, constraints.get(name, TableConstraint()), tuple(table.shape), hotness_of_table[name], cluster
        )
        for name, table in _tables_of(model).items()
    }
    pinned = {name: constraint.ranks for name, constraint in constraints.items() if constraint.ranks is not None}
    return _Search(model, sharder, batch_size, limits, pinned, sharding_types)


@dataclass(frozen=True)
class _Search:
    """What a plan depends on, beside the ranks."""

    model: nn.Module
    sharder: TableSharder
    batch_size: int
    constraints: dict[str, ParameterConstraints]
    pinned: dict[str, tuple[int, ...]]
    sharding_types: Sequence[str]

    def plan(self, cluster: Cluster) -> ShardingPlan:
        """The planner's choice.

        Raises:
            PlannerError: if there is too little memory.
            PlanError: if the planner fails in another way.
        """
        if cluster.device == "cpu":  # where a split by rows is the slower way, for tables that need it
            with suppress(PlannerError):
                return self._plan_with([kind for kind in self.sharding_types if kind not in ROW_SPLITS], cluster)
        return self._plan_with(self.sharding_types, cluster)

    def fits(self, cluster: Cluster) -> bool:
        """Whether there is a plan."""
        try:
            self.plan(cluster)
        except PlannerError:
            return False
        return True

    def _plan_with(self, sharding_types: Sequence[str], cluster: Cluster) -> ShardingPlan:
        topology = cluster.topology()
        planner = EmbeddingShardingPlanner(
            topology=topology,
            batch_size=self.batch_size,
            enumerator=Enumerator(topology, self.batch_size, self.constraints, sharding_types),
            storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
            constraints=self.constraints,
            partitioner=PinnedPartitioner(self.pinned),
        )
        try:
            return planner.plan(self.model, [self.sharder])  # type: ignore[list-item]
        except PlannerError as error:
            if error.error_type in _TOO_LITTLE_MEMORY:
                raise
            raise PlanError(f"no sharding plan: {_first_line(error)}") from None


def _first_line(error: PlannerError) -> str:
    return f"TorchRec's planner says: {(str(error).strip().splitlines() or [error.error_type.value])[0]}"


@dataclass(frozen=True)
class _Shortage:
    """Bytes of a rank, there and needed, and of what memory."""

    where: str
    there: int
    needed: int

    @property
    def missing_gib(self) -> float:
        """GiB a rank."""
        return (self.needed - self.there) / GIB


def _find_shortage(cluster: Cluster, fits: Callable[[Cluster], bool]) -> _Shortage | None:
    """What there is too little of on a rank, and how much more it takes; None where no amount would do."""
    if cluster.device == "cuda" and fits(replace(cluster, host_bytes=_PLENTY)):
        where, there = _OF_THE_HOST, cluster.host_bytes
        needed = _smallest_that_fits(lambda size: fits(replace(cluster, host_bytes=size)), there)
    else:
        where, there = " of the GPU" if cluster.device == "cuda" else "", cluster.table_bytes
        needed = _smallest_that_fits(lambda size: fits(replace(cluster, table_bytes=size)), there)
    return None if needed is None else _Shortage(where, there, needed)


def _describe_shortfall(
    tables: Sequence[nn.Parameter], cluster: Cluster, shortage: _Shortage, batch_size: int | None, is_constrained: bool
) -> str:
    """One line; `batch_size` where a smaller one would do."""
    weights = sum(table.numel() * table.element_size() for table in tables)
    classes = {kind for table in tables for kind in getattr(table, "_optimizer_classes", [])}
    remedies = []
    if batch_size is not None:
        remedies.append(f"a smaller --batch_size or --test_batch_size (the larger is {batch_size:,} samples a rank)")
    if batch_size is None or (shortage.needed - shortage.there) * cluster.world_size < weights:
        more = "more hosts, or hosts with more memory" if shortage.where == _OF_THE_HOST else "more ranks or hosts"
        remedies += [more, "smaller --num_embeddings or --embedding_dim"]
        if is_constrained:
            remedies.append("other --table_constraints, or none")
        if classes != {torch.optim.SGD}:
            remedies.append("--optimizer with less state (rowwise_adagrad: a number a row; sgd: none)")
    if cluster.reserved_share > 0:
        remedies.append("a smaller --reserved_memory_share")
    there = f"{shortage.there / GIB:.2f} GiB{shortage.where} (after {cluster.reserved_share:.0%} reserve)"
    return (
        f"{weights / GIB:.2f} GiB of embedding tables do not fit: {count(cluster.world_size, 'rank')} of {there}, "
        f"{shortage.missing_gib:.2f} GiB a rank more needed with optimizer state and buffers. What would help: "
        f"{'; '.join(remedies)}."
    )


def _smallest_that_fits(fits: Callable[[int], bool], low: int) -> int | None:
    """Capacity per rank in bytes with which a plan exists, found by bisection to about 1 %."""
    high = max(low, GIB // 16)
    for _ in range(20):
        high *= 2
        if fits(high):
            break
    else:
        return None
    low = max(low, high // 2)
    while high - low > high // 100:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@contextmanager
def _quiet_planner() -> Iterator[None]:
    """TorchRec's planner warns of matters that its own callers decide: here, that a topology is built by hand."""
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
        state_floats: optimizer state of a row of a table, of so many weights, in floats.
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
        return shard_rows * (shard_dim * weight_bytes + state_floats(name, shard_dim) * _BYTES_PER_WEIGHT) / GIB

    by_rank = tuple(sum(gib(*size) for owner, *size in shards if owner == rank) for rank in ranks)
    weights_gib = rows * dim * weight_bytes / GIB
    optimizer_gib = rows * state_floats(name, dim) * _BYTES_PER_WEIGHT / GIB
    return TablePlacement(
        name, rows, dim, weights_gib, optimizer_gib, placed.sharding_type, placed.compute_kernel, ranks, by_rank
    )


def _shorten(ranks: tuple[int, ...]) -> str:
    if len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
