"""Where each embedding table lives: TorchRec's planner over the machine's topology, to be printed and saved."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from dlrm.errors import PlanError
from dlrm.runtime import Runtime, count

RESERVED_SHARE = 0.15
"""Share of each device's memory kept for dense parts, activations and batches."""

GIB = 2**30


@dataclass(frozen=True)
class DeviceMemory:
    """What tables may take, in bytes a rank.

    Attributes:
        device: `cuda` or `cpu`.
        table_bytes: of the GPU's memory, or on a CPU of the host's.
        host_bytes: beside a GPU, of the host's memory, for tables that do not fit the GPU.
    """

    device: str
    table_bytes: int
    host_bytes: int = 0

    @staticmethod
    def detect(runtime: Runtime) -> "DeviceMemory":
        """This rank's GPU, or its share of the host's memory, less the reserve."""
        host_bytes = int(runtime.host_memory_bytes // runtime.local_world_size * (1 - RESERVED_SHARE))
        if runtime.device.type != "cuda":
            return DeviceMemory("cpu", host_bytes)
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        return DeviceMemory("cuda", int(total * (1 - RESERVED_SHARE)), host_bytes)

    def topology(self, world_size: int, local_world_size: int) -> Topology:
        """As TorchRec's planner takes it."""
        on_gpu = self.device == "cuda"
        return Topology(
            world_size=world_size,
            local_world_size=local_world_size,
            compute_device=self.device,
            hbm_cap=self.table_bytes if on_gpu else 0,
            ddr_cap=self.host_bytes if on_gpu else self.table_bytes,
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
        totals = [0.0] * self.world_size
        for table in self.tables:
            for rank, gib in zip(table.ranks, table.gib_by_rank, strict=True):
                totals[rank] += gib
        return totals

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
        return f"{len(self.tables)} tables, {self.gib:.2f} GiB, {', '.join(kinds)}, at most {most:.2f} GiB a rank"


def plan_sharding(
    model: nn.Module,
    memory: DeviceMemory,
    world_size: int,
    local_world_size: int,
    batch_size: int,
    constraints: Mapping[str, ParameterConstraints] | None = None,
    *,
    prefetches: bool = False,
) -> ShardingPlan:
    """Chooses a place for each table of `model`, whose parameters carry their fused optimizers.

    Not collective: rank 0 plans, and broadcasts (see `runtime.on_main_rank`).

    Args:
        prefetches: the pipeline fills the GPU's cache of host tables a step ahead, which takes memory for two steps.

    Raises:
        PlanError: if the tables need more memory than there is, with the shortfall in GiB per rank.
    """

    def attempt(table_bytes: int) -> ShardingPlan | None:
        planner = EmbeddingShardingPlanner(
            topology=replace(memory, table_bytes=table_bytes).topology(world_size, local_world_size),
            batch_size=batch_size,
            storage_reservation=FixedPercentageStorageReservation(percentage=0.0),
            constraints=dict(constraints) if constraints else None,
        )
        try:
            return planner.plan(model, [build_sharder(prefetches=prefetches)])  # type: ignore[list-item]
        except PlannerError:
            return None

    with _quiet_planner():
        if (plan := attempt(memory.table_bytes)) is not None:
            return plan
        needed = _smallest_that_fits(lambda table_bytes: attempt(table_bytes) is not None, memory.table_bytes)
    missing = "far more" if needed is None else f"{(needed - memory.table_bytes) / GIB:.2f} GiB a rank more"
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embedding_bags" in n)
    raise PlanError(
        f"{weights / GIB:.2f} GiB of embedding tables do not fit: {count(world_size, 'rank')} of "
        f"{memory.table_bytes / GIB:.2f} GiB (after {RESERVED_SHARE:.0%} reserve), {missing} needed with optimizer "
        "state and buffers. Use more ranks or hosts, smaller --num_embeddings or --embedding_dim, or SGD."
    )


def build_sharder(*, prefetches: bool) -> EmbeddingBagCollectionSharder:
    """Shards tables; where `prefetches`, cache lines stay locked until the step that they were fetched for is over."""
    return EmbeddingBagCollectionSharder(fused_params={"prefetch_pipeline": True} if prefetches else None)


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


def describe_plan(plan: ShardingPlan, model: nn.Module, world_size: int, state_floats_per_weight: int) -> Placement:
    """The plan as a `Placement`.

    Args:
        state_floats_per_weight: optimizer state of a table's element: 0 for SGD, 1 for Adagrad.
    """
    tables = []
    for path, module_plan in plan.plan.items():
        bags = cast(EmbeddingBagCollection, model.get_submodule(path)).embedding_bags
        for name, placed in cast(EmbeddingModuleShardingPlan, module_plan).items():
            weight = cast(torch.Tensor, bags.get_submodule(name).weight)
            tables.append(_describe_table(name, weight, placed, world_size, state_floats_per_weight))
    return Placement(world_size, tuple(tables))


def _describe_table(
    name: str, weight: torch.Tensor, placed: ParameterSharding, world_size: int, states: int
) -> TablePlacement:
    rows, dim = weight.shape
    size = weight.element_size() / GIB
    if placed.sharding_spec is None:  # data parallel: whole on every rank
        ranks = tuple(range(world_size))
        shards = [(rank, rows * dim) for rank in ranks]
    else:
        pieces = placed.sharding_spec.shards  # type: ignore[attr-defined]
        shards = [(piece.placement.rank(), piece.shard_sizes[0] * piece.shard_sizes[1]) for piece in pieces]
        ranks = tuple(sorted({rank for rank, _ in shards}))
    by_rank = tuple(sum(n for owner, n in shards if owner == rank) * size * (1 + states) for rank in ranks)
    gib = rows * dim * size
    return TablePlacement(
        name, rows, dim, gib, gib * states, placed.sharding_type, placed.compute_kernel, ranks, by_rank
    )


def _shorten(ranks: tuple[int, ...]) -> str:
    if len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]}-{ranks[-1]}"
    return ",".join(map(str, ranks))
