"""A user's rules (--table_constraints) in the form that TorchRec's planner takes."""

import copy
from collections.abc import Mapping, Sequence

from torch import nn
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.types import (
    DeviceHardware,
    Perf,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
    Storage,
)
from torchrec.distributed.types import CacheParams, ModuleSharder

from dlrm.config.config import ModelConfig, ShardingConfig
from dlrm.config.frozen import large_tables
from dlrm.config.table_rules import SHARDING_TYPES, TableConstraint, constraints_of_tables, parse_rules
from dlrm.errors import PlanError
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.sharding.cluster import GIB, Cluster
from dlrm.system.console import plural

_MULTIPLE_OF_COLUMNS = 4
_BYTES_PER_WEIGHT = 4


def constraints_of(sharding: ShardingConfig, model: ModelConfig) -> dict[str, TableConstraint]:
    """The rule of each table that has one, by the table's name.

    Raises:
        PlanError: if a rule is for large tables, and there is no such table.
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


def to_parameter_constraints(
    table: str, rule: TableConstraint, shape: tuple[int, ...], hotness: int, cluster: Cluster
) -> ParameterConstraints:
    """The limits that the planner must keep for one table.

    Args:
        shape: rows and columns of the table.
        hotness: ids per sample of the table's feature.

    Raises:
        PlanError: if the rule can't be met on these ranks.
    """
    rows, dim = shape
    sharding, kernel = rule.sharding_type, rule.compute_kernel
    if kernel is not None and "uvm" in kernel and cluster.device != "cuda":
        raise PlanError(f"--table_constraints: {kernel} of {table} needs a GPU, in whose host's memory it keeps rows.")
    if rule.ranks is not None and rule.ranks[-1] >= cluster.world_size:
        raise PlanError(
            f"--table_constraints: rank {rule.ranks[-1]} of {table}, expected 0 to {cluster.world_size - 1}."
        )
    if (splits := _row_splits(sharding, cluster)) > 1 and -(-rows // splits) * (splits - 1) >= rows:
        raise PlanError(
            f"--table_constraints: {sharding} of {table} would split {plural(rows, 'row')} over {splits} ranks and "
            "leave one without any. Use table_wise."
        )
    parts = {
        "column_wise": len(rule.ranks) if rule.ranks else cluster.world_size,
        "table_column_wise": cluster.local_world_size,
        "grid_shard": cluster.world_size // cluster.local_world_size,
    }.get(sharding or "")
    columns = None if parts is None else _columns_of_slice(dim, parts)
    if sharding == "column_wise" and cluster.world_size > 1 and columns == dim:
        raise PlanError(
            f"--table_constraints: column_wise of {table}, whose {dim} columns can't be split evenly over "
            f"{cluster.world_size} ranks or fewer in slices of a multiple of {_MULTIPLE_OF_COLUMNS}. Use table_wise."
        )
    if rule.ranks is not None and columns is not None and columns * len(rule.ranks) != dim:
        raise PlanError(
            f"--table_constraints: {len(rule.ranks)} ranks of {table} can't share its {dim} columns in slices of a "
            f"multiple of {_MULTIPLE_OF_COLUMNS}."
        )
    return ParameterConstraints(
        sharding_types=[sharding] if sharding else None,
        compute_kernels=[kernel] if kernel else None,
        min_partition=columns,
        pooling_factors=[float(hotness)],
        cache_params=None if rule.cache_ratio is None else CacheParams(load_factor=rule.cache_ratio),
    )


def _row_splits(sharding: str | None, cluster: Cluster) -> int:
    """Number of ranks over which a table's rows are split."""
    if sharding == "row_wise":
        return cluster.world_size
    return cluster.local_world_size if sharding in ("table_row_wise", "grid_shard") else 1


def _columns_of_slice(dim: int, parts: int) -> int:
    """Columns of each slice, for as many equal slices as possible, at most `parts`. FBGEMM needs a multiple of 4."""
    fitting = (n for n in range(parts, 0, -1) if dim % n == 0 and dim // n % _MULTIPLE_OF_COLUMNS == 0)
    return dim // next(fitting)


class Enumerator(EmbeddingEnumerator):
    """Lists the possible places of each table for the planner, in the same order in every process.

    If there are rules, TorchRec's own order comes from sets of strings, which differs between processes, and the order
    decides ties in its cost model.
    """

    def __init__(
        self,
        topology: Topology,
        batch_size: int,
        constraints: dict[str, ParameterConstraints],
        sharding_types: Sequence[str],
    ) -> None:
        super().__init__(topology, batch_size, constraints)
        self._sharding_types = sharding_types
        self._ruled = {name for name, constraint in constraints.items() if constraint.sharding_types}

    def _filter_sharding_types(self, name: str, allowed_sharding_types: list[str], sharder_key: str = "") -> list[str]:
        """Filters before options are enumerated, not after: most of a plan's time goes into the cost of each option."""
        if name not in self._ruled:
            allowed_sharding_types = [kind for kind in allowed_sharding_types if kind in self._sharding_types]
        return super()._filter_sharding_types(name, allowed_sharding_types, sharder_key)

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """See TorchRec's EmbeddingEnumerator. Splits that give a rank no rows are left out: FBGEMM's kernels fail."""
        options = [
            option
            for option in super().enumerate(module, sharders)
            if all(shard.size[0] > 0 for shard in option.shards)
        ]
        return sorted(options, key=_order)


def _order(option: ShardingOption) -> tuple[int, int, str]:
    return TABLE_NAMES.index(option.name), SHARDING_TYPES.index(option.sharding_type), option.compute_kernel


class PinnedPartitioner(GreedyPerfPartitioner):
    """Places tables whose rule names ranks first. TorchRec's greedy partitioner then places the rest."""

    def __init__(self, ranks: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._ranks = ranks

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology, hbm_per_device: int | None = None
    ) -> list[ShardingOption]:
        """See TorchRec's Partitioner.

        Raises:
            PlannerError: if a table fits none of its ranks, or the rest does not fit.
        """
        assert hbm_per_device is None, "the memory that pinned tables take would be ignored"
        if not self._ranks:  # no copy needed: for 80 ranks it is a fifth of a plan's time, and TorchRec makes its own
            return super().partition(proposal, storage_constraint, hbm_per_device)
        topology = copy.deepcopy(storage_constraint)
        pinned = [option for option in proposal if option.name in self._ranks]
        for option in sorted(pinned, key=_bytes, reverse=True):  # the largest first, as TorchRec does
            _place(option, [device for device in topology.devices if device.rank in self._ranks[option.name]])
        rest = [option for option in proposal if option.name not in self._ranks]
        super().partition(rest, topology, hbm_per_device)
        return proposal


def _bytes(option: ShardingOption) -> int:
    return option.total_storage.hbm + option.total_storage.ddr


def _place(option: ShardingOption, devices: list[DeviceHardware]) -> None:
    """Places each shard on the least busy of the devices that have room and hold no other shard of the table."""
    for shard in option.shards:
        assert isinstance(shard.storage, Storage)
        assert isinstance(shard.perf, Perf)
        fitting = [device for device in devices if shard.storage.fits_in(device.storage)]
        if not fitting:
            raise PlannerError(
                f"{option.name} does not fit its ranks", error_type=PlannerErrorType.INSUFFICIENT_STORAGE
            )
        device = min(fitting, key=lambda device: (device.perf.total, device.rank))
        shard.rank = device.rank
        device.storage -= shard.storage
        device.perf += shard.perf
        devices.remove(device)
