"""Tables that do not fit a cluster: which memory is short, by how much, and what would help."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dlrm.sharding.cluster import GIB, Cluster
from dlrm.system.console import plural

_PLENTY = 1 << 60
_OF_HOST = " of the host"
_OF_GPU = " of the GPU"


@dataclass(frozen=True)
class Shortage:
    """Memory that each rank has too little of.

    Attributes:
        of_what: ` of the host` or ` of the GPU`; empty on a CPU, where a rank has only one memory.
        available: bytes that a rank has.
        needed: bytes with which a plan exists.
    """

    of_what: str
    available: int
    needed: int

    @property
    def missing_gib(self) -> float:
        """GiB that each rank needs more."""
        return (self.needed - self.available) / GIB


def find_shortage(cluster: Cluster, fits: Callable[[Cluster], bool]) -> Shortage | None:
    """The memory that is short on a cluster that does not fit, found by bisection.

    Args:
        fits: whether there is a plan for a cluster.

    Returns:
        None if no amount of memory would do.
    """
    # Beside GPUs either memory can be the short one. It is the host's if more of that alone would do.
    if cluster.device == "cuda" and fits(replace(cluster, host_bytes=_PLENTY)):
        of_what, available = _OF_HOST, cluster.host_bytes
        needed = _smallest_that_fits(lambda size: fits(replace(cluster, host_bytes=size)), available)
    else:
        of_what, available = _OF_GPU if cluster.device == "cuda" else "", cluster.table_bytes
        needed = _smallest_that_fits(lambda size: fits(replace(cluster, table_bytes=size)), available)
    return None if needed is None else Shortage(of_what, available, needed)


def _smallest_that_fits(fits: Callable[[int], bool], available: int) -> int | None:
    """The least bytes per rank with which a plan exists, to about 1 %; None if 2^20 times as many do not do.

    Args:
        fits: whether a plan exists with a number of bytes per rank.
        available: bytes that are known not to fit.
    """
    low = available
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


def describe_shortfall(
    tables: Collection[nn.Parameter],
    cluster: Cluster,
    shortage: Shortage,
    large_batch: int | None,
    *,
    is_constrained: bool,
) -> str:
    """The shortage and its remedies in one line.

    Args:
        tables: weights, which name the optimizer that is fused into them.
        large_batch: samples of a rank, if a smaller batch would fit; else None.
        is_constrained: whether a rule (--table_constraints) restricts the plan.
    """
    weights = sum(table.numel() * table.element_size() for table in tables)
    reserve = f"(after {cluster.reserved_share:.0%} reserve)"
    remedies = _remedies(tables, cluster, shortage, large_batch, weights, is_constrained)
    return (
        f"{weights / GIB:.2f} GiB of embedding tables do not fit: {plural(cluster.world_size, 'rank')} of "
        f"{shortage.available / GIB:.2f} GiB{shortage.of_what} {reserve}; each rank needs {shortage.missing_gib:.2f} "
        f"GiB more, optimizer state and buffers included. What would help: {'; '.join(remedies)}."
    )


def _remedies(
    tables: Collection[nn.Parameter],
    cluster: Cluster,
    shortage: Shortage,
    large_batch: int | None,
    weights: int,
    is_constrained: bool,
) -> Sequence[str]:
    """What would help: a smaller batch if that does; else, or if they free as much as is missing, other tables."""
    remedies = []
    if large_batch is not None:
        remedies.append(f"a smaller --batch_size or --test_batch_size (the larger is {large_batch:,} samples a rank)")
    if large_batch is None or (shortage.needed - shortage.available) * cluster.world_size < weights:
        more = "more hosts, or hosts with more memory" if shortage.of_what == _OF_HOST else "more ranks or hosts"
        remedies += [more, "smaller --num_embeddings or --embedding_dim"]
        if is_constrained:
            remedies.append("other --table_constraints, or none")
        if {kind for table in tables for kind in getattr(table, "_optimizer_classes", [])} != {torch.optim.SGD}:
            remedies.append("--optimizer with less state (rowwise_adagrad: a number a row; sgd: none)")
    if cluster.reserved_share > 0:
        remedies.append("a smaller --reserved_memory_share")
    return remedies
