"""Pooled rows from rank to rank, through the shared memory of a host.

Each rank has memory for the pooled rows of its samples, which all ranks write into as they look them up, and for their
gradients, which all ranks read as they update their tables. So where the lookup is ours, and the interaction leaves
gradients in that memory, nothing is copied: ranks only wait for each other. There are two such memories, taken in turn.
Step n on two ranks, whose memories are 0 and 1:

    rank 0  write rows -> 0, 1 | meet |  read 0  | gradients -> 0 | meet | read 0, 1 |
    rank 1  write rows -> 0, 1 | meet |  read 1  | gradients -> 1 | meet | read 0, 1 |
            lookup                wait  interaction, forward,       wait   update
                                        loss, interaction, backward        of tables

What keeps a fast rank from writing over what a slow one reads, without counting who refers to it:

1. A rank that takes a memory first leaves the one before: what it still needs of that moves to memory of its own.
2. It meets all others after that, and waits for this meeting before it takes the next memory.
3. So when a rank takes exchange n + 1's memory, all ranks have left that of exchange n - 1, which is the same.

Shapes: B samples of this rank, G samples of all ranks, T columns of this rank's pooled rows, U columns of all ranks'.
"""

from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function
from torchrec.distributed.dist_data import PooledEmbeddingsAwaitable
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

from dlrm.kernels.exchange import exchanges_in_memory
from dlrm.kernels.native import has_native
from dlrm.sharding.host.lookups import HostEmbeddingBag, HostTables


class _Windows:
    """The two memories, and the exchange that has one of them."""

    def __init__(self, boxed_group: Any, rank: int, columns: int) -> None:
        self._group, self._rank, self._columns = boxed_group, rank, columns
        self._memories: tuple[list[torch.Tensor], ...] = ()
        self._turn = 0
        self._latest: _Exchange | None = None

    def take(self, exchange: "_Exchange", rows: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """For each rank [its rows, U], until the next call. The exchange before leaves what it had.

        All ranks ask for the same: a call for more than ever, or for another type, is collective.
        """
        if self._latest is not None:
            self._latest.leave()
        self._latest = exchange
        needed = max(1, max(rows) * self._columns)
        if not self._memories or self._memories[0][0].numel() < needed or self._memories[0][0].dtype != dtype:
            self._memories = tuple(self._share(needed, dtype) for _ in range(2))
        self._turn = 1 - self._turn
        return [
            torch.ops.dlrm.alias_memory(memory, own_rows, self._columns)
            for memory, own_rows in zip(self._memories[self._turn], rows, strict=True)
        ]

    def _share(self, numbers: int, dtype: torch.dtype) -> list[torch.Tensor]:
        memories = torch.ops.dlrm.share_memory(self._group, numbers * dtype.itemsize)
        return [memory.view(dtype) for memory in memories]


class _Exchange:
    """Pooled rows that all ranks write, and the way back of their gradients."""

    def __init__(self, host_dist: "HostPooledDist", rows: list[int], dtype: torch.dtype) -> None:
        self._group, self._rank = host_dist.boxed_group, dist.get_rank(host_dist._pg)
        self._windows, self._rows, self._dtype = host_dist.windows, rows, dtype
        stops = list(accumulate(host_dist._dim_sum_per_rank))
        self._columns = slice(stops[self._rank] - host_dist._dim_sum_per_rank[self._rank], stops[self._rank])
        self._work: Any = None
        self._begin()
        # Another tensor than `own`: the graph of this one knows the exchange.
        self._unread: torch.Tensor | None = torch.empty(0, dtype=dtype).set_(cast(Any, self._own))
        self._awaits_update = False
        self._gradients: list[torch.Tensor] | None = None

    def _begin(self) -> None:
        self._memories = self._windows.take(self, self._rows, self._dtype)
        self._own = self._memories[self._rank]

    def blocks(self) -> list[torch.Tensor]:
        """This rank's columns of all samples [G, T], in a block for each rank."""
        return [memory[:, self._columns] for memory in self._memories]

    def copy_in(self, pooled_GT: torch.Tensor) -> None:
        """Fills the blocks."""
        for block, rows in zip(self.blocks(), pooled_GT.split(self._rows), strict=True):
            block.copy_(rows)

    def meet(self, span: str) -> None:
        """This rank has written. `span` is what a profile shows: TorchRec's names."""
        with record_function(span):
            self._work = torch.ops.dlrm.meet(self._group)

    def take_rows(self) -> torch.Tensor:
        """Once, pooled rows of this rank's samples [B, U], as soon as all ranks have written them."""
        self._wait()
        rows_BU, self._unread = self._unread, None
        assert rows_BU is not None, "taken once"
        return rows_BU

    def give_back(self, gradient_BU: torch.Tensor) -> None:
        """Shows the gradients of this rank's samples to all ranks."""
        if not self._memories:
            self._begin()
        # An interaction may have written them over the pooled rows.
        if gradient_BU.data_ptr() != self._own.data_ptr() or gradient_BU.stride() != self._own.stride():
            self._own.copy_(gradient_BU)
        self._awaits_update = True
        self.meet("## All2All_Pooled_bwd ##")

    def take_gradients(self) -> list[torch.Tensor]:
        """Once, the gradients of this rank's columns, in blocks, as soon as all ranks have given them back."""
        self._wait()
        self._awaits_update = False
        return self._gradients or self.blocks()

    def leave(self) -> None:
        """Gives up the shared memory: what is still needed of it moves to memory of its own."""
        self._wait()
        if self._awaits_update and self._gradients is None:
            self._gradients = [block.clone() for block in self.blocks()]
        torch.ops.dlrm.move_holders(self._own)
        self._memories = []

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


class _LookUpForAll(torch.autograd.Function):
    """Writes pooled rows for all ranks; backward updates the tables with the gradients that all ranks have written."""

    @staticmethod
    def forward(
        ctx: Any,
        placeholder: torch.Tensor,
        exchange: _Exchange,
        tables: HostTables,
        ids_N: torch.Tensor,
        offsets: torch.Tensor,
        learning_rate: torch.Tensor,
        gradient_scale: float,
    ) -> torch.Tensor:
        ctx.exchange, ctx.tables, ctx.learning_rate, ctx.scale = exchange, tables, learning_rate, gradient_scale
        ctx.save_for_backward(ids_N, offsets)
        tables.pool(ids_N, offsets, exchange.blocks())
        exchange.meet("## All2All_Pooled_fwd ##")
        return placeholder.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, ...]:
        gradients = ctx.exchange.take_gradients()
        ctx.tables.update(*ctx.saved_tensors, gradients, ctx.learning_rate.item(), ctx.scale)
        ctx.exchange = None
        return (None,) * 7


class _Send(torch.autograd.Function):
    """The same for pooled rows that another operator has looked up, and updates."""

    @staticmethod
    def forward(ctx: Any, pooled_GT: torch.Tensor, exchange: _Exchange, divisor: int) -> torch.Tensor:
        ctx.exchange, ctx.divisor = exchange, divisor
        exchange.copy_in(pooled_GT)
        exchange.meet("## All2All_Pooled_fwd ##")
        return pooled_GT.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient_GT = torch.cat(ctx.exchange.take_gradients())
        ctx.exchange = None
        return gradient_GT.div_(ctx.divisor) if ctx.divisor != 1 else gradient_GT, None, None


class _Receive(torch.autograd.Function):
    """Waits for what all ranks write; backward begins what the others' backward waits for."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, exchange: _Exchange) -> torch.Tensor:
        ctx.exchange, ctx.token = exchange, token.detach()
        return exchange.take_rows()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.give_back(grad_outputs[0])
        ctx.exchange = None
        return ctx.token, None


class _Pooled(Awaitable[torch.Tensor]):
    """[B, U] on its way. Between the call and the wait others may compute."""

    def __init__(self, token: torch.Tensor, exchange: _Exchange) -> None:
        super().__init__()
        self._left: tuple[torch.Tensor, _Exchange] | None = (token, exchange)

    def _wait_impl(self) -> torch.Tensor:
        assert self._left is not None, "waited for once"
        token, exchange = self._left
        self._left = None  # TorchRec holds this object until long after
        return _Receive.apply(token, exchange)


class HostPooledDist(TwPooledEmbeddingDist):
    """TorchRec's exchange of whole pooled rows, through shared memory. `replace_exchanges` makes it of one of those.

    Attributes:
        boxed_group: its process group.
        windows: what is shared.
        bags: whose lookups are left to this; None where others look up.
        divisor: of gradients: the number of ranks, as TorchRec has it, or 1 where the tables' update sees to that.
    """

    boxed_group: Any
    windows: _Windows
    bags: HostEmbeddingBag | None
    divisor: int

    @staticmethod
    def make_of(
        output_dist: TwPooledEmbeddingDist, bags: HostEmbeddingBag | None = None, divisor: int | None = None
    ) -> "HostPooledDist":
        """Turns TorchRec's into one of these; by default gradients are divided as there."""
        group = cast(Any, output_dist._pg)
        output_dist.__class__ = HostPooledDist
        ours = cast(HostPooledDist, output_dist)
        ours.boxed_group, ours.bags = group.boxed(), bags
        ours.windows = _Windows(ours.boxed_group, dist.get_rank(group), sum(ours._dim_sum_per_rank))
        ours.divisor = group.size() if divisor is None else divisor
        return ours

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> PooledEmbeddingsAwaitable:
        """Pooled rows [G, T] to their samples' ranks; waited for, [B, U]."""
        assert sharding_ctx is None or not sharding_ctx.variable_batch_per_feature, "one batch size for all features"
        ranks = self._pg.size()
        batch_sizes = sharding_ctx.batch_size_per_rank if sharding_ctx is not None else []
        exchange = _Exchange(self, batch_sizes or [local_embs.size(0) // ranks] * ranks, local_embs.dtype)
        features = self.bags.take_features() if self.bags is not None else None
        if self.bags is None or features is None:
            token = _Send.apply(local_embs, exchange, self.divisor)
        else:
            module = self.bags.emb_module
            token = _LookUpForAll.apply(
                module.placeholder_autograd_tensor,
                exchange,
                self.bags.host_tables,
                features.values(),
                features.offsets(),
                module.learning_rate_tensor,
                self.bags.gradient_scale,
            )
        awaitable = PooledEmbeddingsAwaitable(tensor_awaitable=_Pooled(token, exchange))
        awaitable.callbacks.extend(self._callbacks or [])
        return awaitable


def replace_exchanges(model: nn.Module) -> None:
    """Has a sharded model's pooled rows exchanged in place, where their group exchanges in memory and they are whole.

    Call after `replace_lookups`.
    """
    if not has_native():
        return
    for module in model.modules():
        pairs = zip(getattr(module, "_lookups", ()), getattr(module, "_output_dists", ()), strict=False)
        for lookup, output_dist in pairs:
            if type(output_dist) is not TwPooledEmbeddingDist or output_dist._codecs is not None:
                continue
            group = cast(Any, output_dist._pg)
            if exchanges_in_memory(group):
                bags = list(getattr(lookup, "_emb_modules", ()))
                scales = all(isinstance(part, HostEmbeddingBag) for part in bags)
                for part in bags if scales else ():
                    part.gradient_scale = 1 / group.size()
                only = bags[0] if scales and len(bags) == 1 and bags[0].host_tables is not None else None
                if only is not None:
                    only.leaves_lookup = True
                HostPooledDist.make_of(output_dist, only, divisor=1 if scales else None)
