"""Pooled rows from rank to rank, through the shared memory of a host.

Shapes: B samples of this rank, G samples of all ranks, T columns of this rank's pooled rows, U columns of all ranks'.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import record_function
from torchrec.distributed.dist_data import PooledEmbeddingsAwaitable
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingDist
from torchrec.distributed.types import Awaitable

from dlrm.kernels.embedding import HostEmbeddingBag
from dlrm.kernels.native import has_native


class _Pooled(Awaitable[torch.Tensor]):
    """Pooled rows on their way: rows that this rank looked up for others [G, T], to columns of its own samples [B, U].

    TorchRec copies them once more on each side, and their gradients twice more.
    """

    def __init__(self, host_dist: "HostPooledDist", pooled_GT: torch.Tensor, batch_sizes: list[int]) -> None:
        super().__init__()
        self.group, self.columns, self.divisor = host_dist.boxed_group, host_dist._dim_sum_per_rank, host_dist.divisor
        self.rows = batch_sizes
        self.own_rows = batch_sizes[dist.get_rank(host_dist._pg)]
        self.shape = pooled_GT.shape
        self.work: Any = None
        self.target: torch.Tensor | None = None
        self.token: torch.Tensor | None = _Send.apply(pooled_GT, self)

    def _wait_impl(self) -> torch.Tensor:
        token, self.token = self.token, None  # whose graph knows this object: no circle is left
        return _Receive.apply(token, self)

    def start(self, operator: Any, span: str, source: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Begins to fill a new tensor of that shape. `span` is what a profile shows: TorchRec's names."""
        self.target = source.new_empty(shape)
        with record_function(span):
            self.work = operator(self.group, source.contiguous(), self.target, self.rows, self.columns)

    def finish(self) -> torch.Tensor:
        """The tensor, filled."""
        self.work.wait()
        target, self.work, self.target = self.target, None, None
        assert target is not None
        return target


class _Send(torch.autograd.Function):
    """Begins the exchange; backward ends that of the gradients. Between the two, others may compute."""

    @staticmethod
    def forward(ctx: Any, pooled_GT: torch.Tensor, pooled: _Pooled) -> torch.Tensor:
        ctx.pooled = pooled
        shape = (pooled.own_rows, sum(pooled.columns))
        pooled.start(torch.ops.dlrm.rows_to_ranks, "## All2All_Pooled_fwd ##", pooled_GT, shape)
        return pooled_GT.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient_GT = ctx.pooled.finish()
        if ctx.pooled.divisor != 1:
            gradient_GT.div_(ctx.pooled.divisor)
        return gradient_GT, None


class _Receive(torch.autograd.Function):
    """Ends what `_Send` began; backward begins what its backward ends."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, pooled: _Pooled) -> torch.Tensor:
        ctx.pooled, ctx.token = pooled, token.detach()
        return pooled.finish()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        shape = ctx.pooled.shape
        ctx.pooled.start(torch.ops.dlrm.columns_to_ranks, "## All2All_Pooled_bwd ##", grad_outputs[0], shape)
        return ctx.token, None


class HostPooledDist(TwPooledEmbeddingDist):
    """TorchRec's exchange of whole pooled rows, through shared memory. `replace_exchanges` makes it of one of those.

    Attributes:
        boxed_group: its process group.
        divisor: of gradients: the number of ranks, as TorchRec has it, or 1 where the tables' update sees to that.
    """

    boxed_group: Any
    divisor: int

    def forward(
        self, local_embs: torch.Tensor, sharding_ctx: EmbeddingShardingContext | None = None
    ) -> PooledEmbeddingsAwaitable:
        """Pooled rows [G, T] to their samples' ranks; waited for, [B, U]."""
        assert sharding_ctx is None or not sharding_ctx.variable_batch_per_feature, "one batch size for all features"
        ranks = self._pg.size()
        batch_sizes = sharding_ctx.batch_size_per_rank if sharding_ctx is not None else []
        pooled = _Pooled(self, local_embs, batch_sizes or [local_embs.size(0) // ranks] * ranks)
        awaitable = PooledEmbeddingsAwaitable(tensor_awaitable=pooled)
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
            if torch.ops.dlrm.exchanges_in_memory(group.boxed()):
                scales = _scale_gradients(lookup, 1 / group.size())
                output_dist.__class__ = HostPooledDist
                vars(output_dist).update(boxed_group=group.boxed(), divisor=1 if scales else group.size())


def _scale_gradients(lookup: nn.Module, scale: float) -> bool:
    """Has the tables' updates scale their gradients, if all of a lookup's can; whether they do."""
    bags = list(getattr(lookup, "_emb_modules", ()))
    scales = all(isinstance(part, HostEmbeddingBag) for part in bags)
    for part in bags if scales else ():
        part.gradient_scale = scale
    return scales
