"""What each rank of a host reaches while all of them are busy with the same: peak numbers of the cost model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from dlrm.bench.harness.ceilings import matrix_rate

_PRODUCT_SIZE = 1024
_COPIED_BYTES = 256 << 20
"""Of all ranks together."""

_SENT_FLOATS = 1 << 20
"""From a rank to each other rank, in the collectives that show rates."""

_CHUNKS = 3
_PRODUCTS, _COPIES, _OPERATORS, _COLLECTIVES, _SMALL_COLLECTIVES = 8, 4, 5000, 4, 100
"""Calls of a chunk: each a tenth of a second and more, beside which it does not matter that ranks meet."""


@dataclass(frozen=True)
class RankCeilings:
    """Of one rank, all others at work too. Of a single rank, what is of collectives is 0.

    Attributes:
        flop_per_second: of square fp32 products.
        bytes_per_second: of a copy, what it reads and what it writes.
        operator_seconds: of an operator with next to nothing to do.
        sent_bytes_per_second: that leave it in an all-to-all.
        ring_bytes_per_second: in a reduce-scatter and an all-gather, taken together, were they rings.
        reduced_bytes_per_second: in an all-reduce, were it a ring.
        collective_seconds: of an all-to-all of next to no bytes.
    """

    flop_per_second: float
    bytes_per_second: float
    operator_seconds: float
    sent_bytes_per_second: float = 0.0
    ring_bytes_per_second: float = 0.0
    reduced_bytes_per_second: float = 0.0
    collective_seconds: float = 0.0

    def to_json(self) -> dict[str, float]:
        """For a result."""
        return asdict(self)


def measure_rank(ranks: int) -> RankCeilings:
    """Measures this rank. Collective: `ranks` ranks of the default process group, none for a single one.

    Ranks begin together and are over when the last one is: where there are more ranks than cores, a call that met no
    other rank says nothing of what a rank reaches.
    """

    def timed(calls: int, call: Callable[[], object]) -> float:
        return min(_chunk_seconds(ranks, calls, call) for _ in range(_CHUNKS)) / calls

    small = torch.ones(16)
    source, target = torch.ones(2, _COPIED_BYTES // 4 // ranks)
    rate = matrix_rate(torch.float32, lambda call: timed(_PRODUCTS, call), (_PRODUCT_SIZE,))
    copy = timed(_COPIES, lambda: target.copy_(source))
    operator = timed(_OPERATORS, lambda: torch.add(small, 1.0, out=small))
    # A copy reads and writes.
    alone = (rate, 2 * 4 * source.numel() / copy, operator)
    if ranks == 1:
        return RankCeilings(*alone)
    whole, other, part = torch.ones(ranks * _SENT_FLOATS), torch.ones(ranks * _SENT_FLOATS), torch.ones(_SENT_FLOATS)
    few, too = torch.ones(2, ranks)
    sent = 4 * _SENT_FLOATS * (ranks - 1)
    exchanged = timed(_COLLECTIVES, lambda: dist.all_to_all_single(other, whole))
    scattered = timed(_COLLECTIVES, lambda: dist.reduce_scatter_tensor(part, whole))
    gathered = timed(_COLLECTIVES, lambda: dist.all_gather_into_tensor(other, part))
    # The largest, since sums in place would soon be infinite.
    reduced = timed(_COLLECTIVES, lambda: dist.all_reduce(whole, dist.ReduceOp.MAX))
    waited = timed(_SMALL_COLLECTIVES, lambda: dist.all_to_all_single(few, too))
    return RankCeilings(*alone, sent / exchanged, 2 * sent / (scattered + gathered), 2 * sent / reduced, waited)


def _chunk_seconds(ranks: int, calls: int, call: Callable[[], Any]) -> float:
    """From when all ranks begin until all are over, after a call that is not counted."""
    call()
    _meet(ranks)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    _meet(ranks)
    return time.perf_counter() - started


def _meet(ranks: int) -> None:
    if ranks > 1:
        dist.barrier()


def combine(measured: Sequence[Sequence[RankCeilings]]) -> RankCeilings:
    """Of an average rank at the best time, each number by itself. By time and rank."""

    def averages(name: str) -> list[float]:
        return [sum(getattr(rank, name) for rank in ranks) / len(ranks) for ranks in measured]

    return RankCeilings(
        **{name: max(averages(name)) for name in RankCeilings.__annotations__ if name.endswith("per_second")},
        **{name: min(averages(name)) for name in ("operator_seconds", "collective_seconds")},
    )
