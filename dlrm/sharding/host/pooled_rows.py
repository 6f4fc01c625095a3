"""Pooled rows from rank to rank, through the shared memory of a host, in place of TorchRec's all-to-all.

Each rank has a buffer with a row for each of its samples and the columns of all ranks' tables. All ranks write their
columns as they look them up, and read the gradients of these columns as they update their tables. If the lookup is ours
and the interaction writes gradients over its input, nothing is copied: ranks only wait for each other. One training
step on two ranks, each with one table, from top to bottom:

                 rank 0                                      rank 1
    lookup       table 0's rows -> buffers 0 and 1           table 1's rows -> buffers 0 and 1
                 =============== barrier: all rows are written ==============================
    forward      reads buffer 0: interaction, MLP, loss      reads buffer 1: interaction, MLP, loss
    backward     gradients of its samples -> buffer 0        gradients of its samples -> buffer 1
                 =============== barrier: all gradients are written =========================
    update       its columns of buffers 0 and 1 -> table 0   its columns of buffers 0 and 1 -> table 1
    next step    uses the other pair of buffers, since a slow rank may still read these (see _DoubleBuffer)

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

_FORWARD_SPAN, _BACKWARD_SPAN = "## All2All_Pooled_fwd ##", "## All2All_Pooled_bwd ##"
"""TorchRec's names, under which a profile shows the exchange."""


class _DoubleBuffer:
    """Two sets of buffers, which exchanges use in turn. A set has a buffer for each rank.

    A fast rank may write exchange n + 1 while a slow one still reads n. It cannot get further ahead, so that two sets
    are enough:

    1. Before a rank takes a set for its next exchange, it leaves the set of the one before: it waits for that
       exchange's barrier, and what it still needs (rows, gradients that no update has read) moves to its own memory.
    2. Then it writes into the new set and enters the barrier of the new exchange.
    3. So when a rank takes a set for exchange n + 1, it has passed barrier n. All ranks entered that barrier after they
       had left the set of exchange n - 1, which is the set taken now: nobody reads it any more.

    The argument needs only this order of events. A count of the references to a buffer would not do: the thread of a
    debugger, a profiler or a watchdog may hold one for a moment.
    """

    def __init__(self, boxed_group: Any, columns: int) -> None:
        self._group, self._columns = boxed_group, columns
        self._sets: tuple[list[torch.Tensor], ...] = ()
        self._turn = 0
        self._latest: _Exchange | None = None

    def take(self, exchange: "_Exchange", rows: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """For each rank its buffer [its rows, U], which `exchange` may use until the next call.

        Collective if it asks for more rows than any call before, or for another type. All ranks ask for the same.
        """
        if self._latest is not None:
            self._latest.leave()
        self._latest = exchange
        needed = max(1, max(rows) * self._columns)
        if not self._sets or self._sets[0][0].numel() < needed or self._sets[0][0].dtype != dtype:
            self._sets = tuple(self._share(needed, dtype) for _ in range(2))
        self._turn = 1 - self._turn
        return [
            torch.ops.dlrm.alias_memory(memory, own_rows, self._columns)
            for memory, own_rows in zip(self._sets[self._turn], rows, strict=True)
        ]

    def _share(self, numbers: int, dtype: torch.dtype) -> list[torch.Tensor]:
        memories = torch.ops.dlrm.share_memory(self._group, numbers * dtype.itemsize)
        return [memory.view(dtype) for memory in memories]


class _Exchange:
    """One exchange: all ranks write pooled rows, and later the gradients of these rows come back."""

    def __init__(self, output_dist: "SharedMemoryPooledDist", rows: list[int], dtype: torch.dtype) -> None:
        self._group, self._rank = output_dist.boxed_group, dist.get_rank(output_dist._pg)
        self._double_buffer, self._rows, self._dtype = output_dist.double_buffer, rows, dtype
        stops = list(accumulate(output_dist._dim_sum_per_rank))
        self._columns = slice(stops[self._rank] - output_dist._dim_sum_per_rank[self._rank], stops[self._rank])
        self._work: Any = None
        self._take_buffers()
        # A second tensor on the storage of `own`. Autograd attaches the graph to it, and the graph refers to this
        # exchange: if `own` had the graph, the two would keep each other alive.
        self._unread: torch.Tensor | None = torch.empty(0, dtype=dtype).set_(cast(Any, self._own))
        self._awaits_update = False
        self._gradients: list[torch.Tensor] | None = None

    def _take_buffers(self) -> None:
        self._buffers = self._double_buffer.take(self, self._rows, self._dtype)
        self._own = self._buffers[self._rank]

    def blocks(self) -> list[torch.Tensor]:
        """This rank's columns of all samples [G, T], as a block of each rank's buffer."""
        return [buffer[:, self._columns] for buffer in self._buffers]

    def write(self, pooled_GT: torch.Tensor) -> None:
        """Copies this rank's pooled rows into the blocks."""
        for block, rows in zip(self.blocks(), pooled_GT.split(self._rows), strict=True):
            block.copy_(rows)

    def enter_barrier(self, span: str) -> None:
        """Says that this rank has written, without waiting for the others. A profile shows it as `span`."""
        with record_function(span):
            self._work = torch.ops.dlrm.meet(self._group)

    def take_rows(self) -> torch.Tensor:
        """Waits until all ranks have written; gives the pooled rows of this rank's samples [B, U]. Call it once."""
        self._wait()
        rows_BU, self._unread = self._unread, None
        assert rows_BU is not None, "take_rows is called once"
        return rows_BU

    def return_gradients(self, gradient_BU: torch.Tensor) -> None:
        """Shows the gradients of this rank's samples to all ranks."""
        if not self._buffers:  # a later exchange has taken them
            self._take_buffers()
        # The interaction may have written the gradients over the pooled rows: they are in place then.
        if gradient_BU.data_ptr() != self._own.data_ptr() or gradient_BU.stride() != self._own.stride():
            self._own.copy_(gradient_BU)
        self._awaits_update = True
        self.enter_barrier(_BACKWARD_SPAN)

    def take_gradients(self) -> list[torch.Tensor]:
        """Waits until all ranks have returned gradients; gives this rank's columns, in blocks. Call it once."""
        self._wait()
        self._awaits_update = False
        return self._gradients or self.blocks()

    def leave(self) -> None:
        """Gives up the buffers. What is still needed of them moves to memory of this rank's own."""
        self._wait()
        if self._awaits_update and self._gradients is None:
            self._gradients = [block.clone() for block in self.blocks()]
        torch.ops.dlrm.move_holders(self._own)
        self._buffers = []

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None


class _LookupIntoBuffers(torch.autograd.Function):
    """Looks up into all ranks' buffers. Backward updates the tables with the gradients that it finds there."""

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
        exchange.enter_barrier(_FORWARD_SPAN)
        return placeholder.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, ...]:
        gradients = ctx.exchange.take_gradients()
        ctx.tables.update(*ctx.saved_tensors, gradients, ctx.learning_rate.item(), ctx.scale)
        ctx.exchange = None
        return (None,) * 7


class _CopyIntoBuffers(torch.autograd.Function):
    """The same for pooled rows that another operator looks up and updates: they are copied to and from the buffers."""

    @staticmethod
    def forward(ctx: Any, pooled_GT: torch.Tensor, exchange: _Exchange, divisor: int) -> torch.Tensor:
        ctx.exchange, ctx.divisor = exchange, divisor
        exchange.write(pooled_GT)
        exchange.enter_barrier(_FORWARD_SPAN)
        return pooled_GT.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient_GT = torch.cat(ctx.exchange.take_gradients())
        ctx.exchange = None
        return gradient_GT.div_(ctx.divisor) if ctx.divisor != 1 else gradient_GT, None, None


class _ReadOwnBuffer(torch.autograd.Function):
    """Waits for all ranks and gives this rank's pooled rows. Backward returns their gradients to all ranks.

    `token` is the empty output of a lookup or a copy into the buffers. It carries no numbers: it has autograd run the
    backward pass of that function, which waits for all gradients, after this one's.
    """

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, exchange: _Exchange) -> torch.Tensor:
        ctx.exchange, ctx.token = exchange, token.detach()
        return exchange.take_rows()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.return_gradients(grad_outputs[0])
        ctx.exchange = None
        return ctx.token, None


class _PooledRowsAwaitable(Awaitable[torch.Tensor]):
    """Pooled rows [B, U] that may still be on their way. The pipeline computes something else before it waits."""

    def __init__(self, token: torch.Tensor, exchange: _Exchange) -> None:
        super().__init__()
        self._pending: tuple[torch.Tensor, _Exchange] | None = (token, exchange)

    def _wait_impl(self) -> torch.Tensor:
        assert self._pending is not None, "an awaitable is waited for once"
        token, exchange = self._pending
        self._pending = None  # TorchRec keeps this object much longer than the exchange is needed
        return _ReadOwnBuffer.apply(token, exchange)


class SharedMemoryPooledDist(TwPooledEmbeddingDist):
    """TorchRec's exchange of whole pooled rows, but through shared memory. `make_of` turns TorchRec's into this.

    Attributes:
        boxed_group: the process group, as the operators take it.
        double_buffer: the shared memory.
        bags: the embedding bags that defer their lookups to this exchange; None if the input is looked up already.
        divisor: what gradients are divided by: the number of ranks, as in TorchRec, or 1 if the update of the tables
            scales them.
    """

    boxed_group: Any
    double_buffer: _DoubleBuffer
    bags: HostEmbeddingBag | None
    divisor: int

    @staticmethod
    def make_of(
        output_dist: TwPooledEmbeddingDist, bags: HostEmbeddingBag | None = None, divisor: int | None = None
    ) -> "SharedMemoryPooledDist":
        """Changes the class of TorchRec's object. By default gradients are divided by the number of ranks, as there."""
        group = cast(Any, output_dist._pg)
        output_dist.__class__ = SharedMemoryPooledDist
        ours = cast(SharedMemoryPooledDist, output_dist)
        ours.boxed_group, ours.bags = group.boxed(), bags
        ours.double_buffer = _DoubleBuffer(ours.boxed_group, sum(ours._dim_sum_per_rank))
        ours.divisor = group.size() if divisor is None else divisor
        return ours

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> PooledEmbeddingsAwaitable:
        """Sends pooled rows [G, T] to the ranks of their samples. Waiting for the result gives [B, U]."""
        assert sharding_ctx is None or not sharding_ctx.variable_batch_per_feature, "one batch size for all features"
        ranks = self._pg.size()
        batch_sizes = sharding_ctx.batch_size_per_rank if sharding_ctx is not None else []
        exchange = _Exchange(self, batch_sizes or [local_embs.size(0) // ranks] * ranks, local_embs.dtype)
        features = self.bags.take_features() if self.bags is not None else None
        if self.bags is None or features is None:
            token = _CopyIntoBuffers.apply(local_embs, exchange, self.divisor)
        else:
            module = self.bags.emb_module
            token = _LookupIntoBuffers.apply(
                module.placeholder_autograd_tensor,
                exchange,
                self.bags.host_tables,
                features.values(),
                features.offsets(),
                module.learning_rate_tensor,
                self.bags.gradient_scale,
            )
        awaitable = PooledEmbeddingsAwaitable(tensor_awaitable=_PooledRowsAwaitable(token, exchange))
        awaitable.callbacks.extend(self._callbacks or [])
        return awaitable


def replace_exchanges(model: nn.Module) -> None:
    """Exchanges a sharded model's pooled rows through shared memory, if their group does and they are whole rows.

    Call after `replace_lookups`. Pooled rows that are sums over ranks, or that TorchRec quantizes, are exchanged as
    before.
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
                    only.defers_lookup = True
                SharedMemoryPooledDist.make_of(output_dist, only, divisor=1 if scales else None)
