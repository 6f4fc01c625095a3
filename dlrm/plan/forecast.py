"""The forecast: from a plan, the hardware and the flags to the memory of each rank and the time of a step."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dlrm.config.config import CommPrecision, Config, Precision
from dlrm.config.recipes import RANKS, RECIPES
from dlrm.config.table_rules import ROW_SPLITS
from dlrm.cost.hardware import GIB, ClusterShape, Hardware, precision_on
from dlrm.cost.memory import RankMemory, memory_of_ranks
from dlrm.cost.network import Collective, Network
from dlrm.cost.optimizer_state import table_state_floats
from dlrm.cost.step import Step, StepWorkload, build_step
from dlrm.cost.work import DEFAULT_CACHE_SHARE, FLOAT, Rates, TableWorkload
from dlrm.loader.run_data import hotness_of
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.constraints import constraints_of
from dlrm.sharding.placement import Placement, TablePlacement

_HALF = 2
"""Bytes of a bf16 or fp16 number."""


def forecast(config: Config, shape: ClusterShape, hardware: Hardware, placement: Placement) -> dict[str, Any]:
    """What training with this plan would take: facts, ready for JSON.

    Raises:
        ConfigError: if the hardware does not have the run's arithmetic.
    """
    precision = precision_on(config, hardware, shape)
    load = workload_of(config, shape, placement)
    memory, at_least = (_memory(config, load, shape, hardware, samples) for samples in (config.data.batch_size, 1))
    step = build_step(load, *reached(hardware, shape, precision))
    missing = _missing_gib(memory)
    return {
        "cluster": _describe_cluster(shape, hardware),
        "fits": not missing,
        "error": _describe_missing(missing, is_batch=not _missing_gib(at_least)) if missing else None,
        "batch_size": config.data.batch_size,
        "global_batch_size": step.samples,
        "recipe_batch": _describe_recipe(config.recipe),
        "precision": precision,
        "optimizer": config.optimizer.algorithm,
        "pipeline": config.training.pipeline,
        "tables_gib": placement.gib,
        "optimizer_gib": sum(table.optimizer_gib for table in placement.tables),
        "tables": [asdict(table) for table in placement.tables],
        "memory_gib_per_rank": [
            {name: size / GIB for name, size in asdict(rank_memory).items()} for rank_memory in memory
        ],
        "activations_missing_gib": missing,
        "collectives": [_describe_collective(one) for one in step.collectives],
        "step": _describe_step(step),
    }


def _memory(
    config: Config, load: StepWorkload, shape: ClusterShape, hardware: Hardware, samples: int
) -> list[RankMemory]:
    return memory_of_ranks(
        config.model,
        load.tables,
        config.optimizer.algorithm,
        config.training.pipeline,
        samples,
        load.width,
        shape.world_size,
        hardware.memory_bytes,
        config.sharding.reserved_memory_share,
    )


def _missing_gib(memory: Sequence[RankMemory]) -> float:
    return max(0.0, *(-rank_memory.free / GIB for rank_memory in memory))


def _describe_missing(gib: float, *, is_batch: bool) -> str:
    if is_batch:
        what = "batches, activations and gradients"
        remedies = "a smaller --batch_size; more hosts or fewer replicated tables, which leave more room beside tables"
    else:
        what = "the dense layers and replicated tables with their gradients and optimizer state, whatever the batch,"
        remedies = "smaller layers; fewer replicated tables; --optimizer with less state"
    return (
        f"The tables fit, but {what} are expected to need {gib:.2f} GiB more than there is on a rank. What would help: "
        f"{remedies}; more of the memory kept for them (--reserved_memory_share)."
    )


def _describe_recipe(name: str | None) -> dict[str, int] | None:
    """The global batch that a recipe is for; None if it is for no number of ranks."""
    if name not in RANKS:
        return None
    ranks, batch_size = RANKS[name], RECIPES[name]().data.batch_size
    return {"ranks": ranks, "batch_size": batch_size, "global_batch_size": ranks * batch_size}


def workload_of(config: Config, shape: ClusterShape, placement: Placement) -> StepWorkload:
    """What a step of training with this plan has to do."""
    return StepWorkload(
        config.model,
        _tables_on_ranks(config, shape, placement),
        config.data.batch_size,
        _HALF if config.training.activations == "bf16" else FLOAT,
        config.optimizer.algorithm,
        hides_input=config.training.pipeline != "base",
        launches=config.training.dense_execution != "cuda_graph",
    )


def _describe_cluster(shape: ClusterShape, hardware: Hardware) -> dict[str, Any]:
    return {
        **asdict(shape),
        "name": str(shape),
        "world_size": shape.world_size,
        "device_memory_gib": hardware.memory_bytes / GIB,
        "host_memory_gib": hardware.host_memory_bytes / GIB,
        "memory_bandwidth_gib_per_second": hardware.memory_bandwidth / GIB,
        "host_device_bandwidth_gib_per_second": hardware.host_device_bandwidth / GIB,
        "intra_host_bandwidth_gib_per_second": hardware.intra_host_bandwidth / GIB,
        "inter_host_bandwidth_gib_per_second": hardware.inter_host_bandwidth / GIB,
        "matrix_tflops": {name: rate / 1e12 for name, rate in hardware.matrix_rates.items()},
        "launch_us": hardware.launch_seconds * 1e6,
        "collective_latency_us": hardware.collective_seconds * 1e6,
        "message_us": hardware.message_seconds * 1e6,
        "matrix_efficiency": hardware.matrix_efficiency,
        "memory_efficiency": hardware.memory_efficiency,
        "network_efficiency": hardware.network_efficiency,
        "ring_share": hardware.ring_share,
        "reduction_share": hardware.reduction_share,
        "overlaps": hardware.overlaps,
    }


def _describe_collective(one: Collective) -> dict[str, Any]:
    return {
        "name": one.name,
        "bytes_per_rank": round(one.bytes_per_rank),
        "inter_host_bytes_per_host": round(one.inter_host_bytes),
        "num_bytes": round(one.num_bytes),
        "time_ms": one.seconds * 1e3,
        "bound_by": one.bound_by,
    }


def _describe_step(step: Step) -> dict[str, Any]:
    return {
        "step_time_ms": step.seconds * 1e3,
        "lookup_time_ms": step.seconds_of("lookup") * 1e3,
        "dense_time_ms": step.seconds_of("dense") * 1e3,
        "communication_time_ms": step.seconds_of("communication") * 1e3,
        "exposed_communication_time_ms": step.exposed_communication_seconds * 1e3,
        "bound_by": step.bound_by,
        "samples_per_second": step.samples_per_second,
        "timeline": [
            {
                "name": span.name,
                "part": span.part,
                "start_ms": span.start * 1e3,
                "end_ms": span.end * 1e3,
                "bound_by": span.bound_by,
            }
            for span in sorted(step.spans, key=lambda span: span.start)
        ],
    }


def reached(hardware: Hardware, shape: ClusterShape, precision: Precision) -> tuple[Rates, Network]:
    """Rates and bandwidths that are reached: peak numbers times the share of them that is."""
    rates = Rates(
        hardware.matrix_rates[precision] * hardware.matrix_efficiency,
        hardware.memory_bandwidth * hardware.memory_efficiency,
        hardware.host_device_bandwidth * hardware.memory_efficiency,
        hardware.launch_seconds,
        hardware.overlaps,
    )
    network = Network(
        shape.world_size,
        shape.devices_per_host,
        hardware.intra_host_bandwidth * hardware.network_efficiency,
        hardware.inter_host_bandwidth * hardware.network_efficiency,
        hardware.collective_seconds,
        hardware.message_seconds,
        hardware.ring_share,
        hardware.reduction_share,
    )
    return rates, network


def _tables_on_ranks(config: Config, shape: ClusterShape, placement: Placement) -> list[TableWorkload]:
    hotness = dict(zip(TABLE_NAMES, hotness_of(config), strict=True))
    rules = constraints_of(config.sharding, config.model)
    tables = []
    for table in placement.tables:
        cached = rules[table.table].cache_ratio if table.table in rules else None
        cache_share = DEFAULT_CACHE_SHARE if cached is None else cached
        state_floats = table_state_floats(config, table.table, config.model.embedding_dim)
        tables.append(_on_ranks(config, table, hotness[table.table], shape, cache_share, state_floats))
    return tables


def _on_ranks(
    config: Config, table: TablePlacement, hotness: int, shape: ClusterShape, cache_share: float, state_floats: float
) -> TableWorkload:
    held = sum(table.gib_by_rank)
    is_replicated = table.sharding == "data_parallel"
    row_splits = {
        "row_wise": len(table.ranks),
        "table_row_wise": len(table.ranks),
        "grid_shard": shape.devices_per_host,
    }.get(table.sharding, 1)
    sharding = config.sharding
    # Pooled rows that no other rank adds to are final, and travel in the type of the activations.
    is_rounded = (
        config.training.activations == "bf16"
        and table.sharding not in ROW_SPLITS
        and sharding.forward_comm_precision == sharding.backward_comm_precision == "fp32"
    )
    return TableWorkload(
        table.table,
        table.rows,
        table.dim,
        hotness,
        table.sharding,
        table.kernel,
        table.ranks,
        tuple(1.0 if is_replicated else gib / held for gib in table.gib_by_rank),
        state_floats,
        row_splits,
        cache_share,
        _HALF if is_rounded else _width(sharding.forward_comm_precision, is_replicated),
        _HALF if is_rounded else _width(sharding.backward_comm_precision, is_replicated),
    )


def _width(precision: CommPrecision, is_replicated: bool) -> int:
    """Bytes of each number of a pooled row that is sent. Rows of replicated tables are not sent."""
    return FLOAT if precision == "fp32" or is_replicated else _HALF
