"""Lookup and fused update of embedding tables in host memory, in place of FBGEMM's.

Only the forward of a module and what its backward does are replaced. Weights, optimizer state, learning rate and
checkpoints stay FBGEMM's and TorchRec's.

Shapes: B samples, F features, N ids, T columns of all features' pooled rows.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbeddingBag
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.kernels.native import has_native

_OPTIMIZERS = {
    EmbOptimType.EXACT_SGD: 0,
    EmbOptimType.EXACT_ADAGRAD: 1,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: 2,
}
"""The numbers of the optimizers in csrc/kernels.h."""
_WHOLE_ROWS = ("table_wise", "column_wise", "table_column_wise")
"""Sharding types in which one rank has a whole pooled row, or whole columns of it. Others sum ranks' parts."""


@dataclass(frozen=True)
class HostTables:
    """FBGEMM's tensors that the operators read and update. Offsets are those of each feature, as in FBGEMM."""

    weights: torch.Tensor
    weight_offsets_F: torch.Tensor
    rows_F: torch.Tensor
    dim_offsets_F1: torch.Tensor
    state: torch.Tensor | None
    state_offsets_F: torch.Tensor | None
    optimizer: int
    eps: float
    is_frozen: bool

    @staticmethod
    def of(module: SplitTableBatchedEmbeddingBagsCodegen) -> "HostTables | None":
        """The tensors of a module; None without the operators, or if the module needs what they can't do."""
        buffers = cast(Any, module)  # FBGEMM registers its buffers by name, so type checkers don't see them
        features = module.feature_table_map
        supported = (
            has_native()
            and module.optimizer in _OPTIMIZERS
            and module.pooling_mode == PoolingMode.SUM
            and buffers.weights_host.dtype == torch.float32
            and buffers.weights_host.numel() > 0
            and len(set(features)) == len(features)
            and not module.optimizer_args.weight_decay
        )
        if not supported:
            return None
        has_state = module.optimizer != EmbOptimType.EXACT_SGD
        rows = [module.embedding_specs[table][0] for table in features]
        return HostTables(
            buffers.weights_host.detach(),
            buffers.weights_offsets,
            torch.tensor(rows, dtype=torch.int64),
            buffers.D_offsets.to(torch.int64),
            buffers.momentum1_host.detach() if has_state else None,
            buffers.momentum1_offsets if has_state else None,
            _OPTIMIZERS[module.optimizer],
            module.optimizer_args.eps,
            hasattr(module, "is_frozen"),
        )

    @property
    def columns(self) -> int:
        """T, the columns of a pooled row."""
        return int(self.dim_offsets_F1[-1])

    def batch_size(self, offsets: torch.Tensor) -> int:
        """B of a batch with these offsets of bags."""
        return (offsets.numel() - 1) // self.rows_F.numel()

    def pool(self, ids_N: torch.Tensor, offsets: torch.Tensor, pooled: Sequence[torch.Tensor]) -> None:
        """Fills `pooled` with the sum of each bag's rows.

        Args:
            ids_N: int32 or int64.
            offsets: [F * B + 1] first id of each bag, feature by feature.
            pooled: [B, T] in float32 or bfloat16, cut into blocks of rows if the samples belong to several ranks.

        Raises:
            IndexError: if an id is outside its table.
        """
        torch.ops.dlrm.pool(
            self.weights, self.weight_offsets_F, self.rows_F, self.dim_offsets_F1, ids_N, offsets, pooled
        )

    def update(
        self,
        ids_N: torch.Tensor,
        offsets: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        learning_rate: float,
        gradient_scale: float = 1.0,
    ) -> None:
        """One step of the optimizer on the rows that were looked up, each with the scaled sum of its gradients.

        Frozen tables stay as they are. The result is the same to the bit for any number of threads.

        Args:
            ids_N: those of the lookup.
            offsets: those of the lookup.
            gradients: the gradients of the pooled rows, in blocks as in `pool`.
            learning_rate: the optimizer's.
            gradient_scale: what the gradients are multiplied by.
        """
        if self.is_frozen:
            return
        torch.ops.dlrm.update(
            self.weights,
            self.state,
            self.state_offsets_F,
            self.weight_offsets_F,
            self.rows_F,
            self.dim_offsets_F1,
            ids_N,
            offsets,
            gradients,
            self.optimizer,
            learning_rate,
            self.eps,
            gradient_scale,
        )


class Lookup(torch.autograd.Function):
    """Looks up pooled rows. Backward updates the tables."""

    @staticmethod
    def forward(
        ctx: Any,
        placeholder: torch.Tensor,  # noqa: ARG004 - requires a gradient, so that backward is called
        tables: HostTables,
        ids_N: torch.Tensor,
        offsets: torch.Tensor,
        learning_rate: torch.Tensor,
        dtype: torch.dtype,
        gradient_scale: float,
    ) -> torch.Tensor:
        ctx.tables, ctx.learning_rate, ctx.gradient_scale = tables, learning_rate, gradient_scale
        ctx.save_for_backward(ids_N, offsets)
        pooled_BT = torch.empty(tables.batch_size(offsets), tables.columns, dtype=dtype)
        tables.pool(ids_N, offsets, [pooled_BT])
        return pooled_BT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, ...]:
        ids_N, offsets = ctx.saved_tensors
        ctx.tables.update(ids_N, offsets, grad_outputs, ctx.learning_rate.item(), ctx.gradient_scale)
        return (None,) * 7


class HostEmbeddingBag(BatchedFusedEmbeddingBag):
    """TorchRec's fused embedding bags, but with this package's operators. `replace_lookups` turns TorchRec's into this.

    Attributes:
        host_tables: what the operators work on; None if FBGEMM looks up.
        pooled_type: the type of pooled rows; they are summed in float32.
        gradient_scale: what the gradients of pooled rows are multiplied by.
        defers_lookup: whether the exchange that follows looks up, with what `take_features` gives it.
    """

    host_tables: HostTables | None
    pooled_type: torch.dtype
    gradient_scale: float
    defers_lookup: bool
    _deferred: KeyedJaggedTensor | None

    def forward(
        self,
        features: KeyedJaggedTensor,
        vbe_output: torch.Tensor | None = None,
        vbe_output_offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pooled rows [B, T], or [B, 0] if the lookup is deferred."""
        tables = self.host_tables
        if tables is None or features.variable_stride_per_key() or features.weights_or_none() is not None:
            pooled = super().forward(features, vbe_output, vbe_output_offsets)
            if pooled.requires_grad and self.gradient_scale != 1:
                pooled.register_hook(lambda gradient: gradient * self.gradient_scale)
            return pooled.to(self.pooled_type)
        if self.defers_lookup:
            self._deferred = features
            return torch.empty(features.stride(), 0, dtype=self.pooled_type)
        return Lookup.apply(
            self.emb_module.placeholder_autograd_tensor,
            tables,
            features.values(),
            features.offsets(),
            self.emb_module.learning_rate_tensor,
            self.pooled_type,
            self.gradient_scale,
        )

    def take_features(self) -> KeyedJaggedTensor | None:
        """The features of the last call, if their lookup was deferred and they were not taken yet."""
        features, self._deferred = self._deferred, None
        return features


class _StopGradient(torch.autograd.Function):
    """Pooled rows whose gradients are thrown away.

    They require a gradient all the same: other ranks wait for the exchange in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, placeholder: torch.Tensor, pooled_BT: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return pooled_BT

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


def freeze_lookups(model: nn.Module, frozen: Collection[str]) -> None:
    """Keeps the backward pass of a sharded model from updating frozen tables.

    TorchRec groups tables by optimizer, so the tables of a lookup are all frozen, or none is.
    """
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):
            for bags in getattr(lookup, "_emb_modules", ()):
                tables = {table.name for table in bags.config.embedding_tables}
                if isinstance(bags.emb_module, SplitTableBatchedEmbeddingBagsCodegen) and tables & set(frozen):
                    assert tables <= set(frozen), f"one lookup has frozen tables and others: {sorted(tables)}"
                    _freeze(bags.emb_module)


def _freeze(module: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    plain = module.forward

    def forward_of_frozen(*inputs: Any, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            pooled_BT = plain(*inputs, **options)
        return _StopGradient.apply(module.placeholder_autograd_tensor, pooled_BT)

    vars(module).update(forward=forward_of_frozen, is_frozen=True)


def replace_lookups(model: nn.Module, pooled_type: torch.dtype) -> None:
    """Lets the operators look up and update a sharded model's tables in host memory, if they can.

    Args:
        model: sharded by TorchRec; its lookups are changed in place.
        pooled_type: the type of pooled rows that are whole when they leave their rank. All ranks must give the same.
    """
    for lookup, own_type in _set_pooled_types(model, pooled_type):
        for bags in getattr(lookup, "_emb_modules", ()):
            if type(bags) is BatchedFusedEmbeddingBag:
                bags.__class__ = HostEmbeddingBag
                tables = HostTables.of(bags.emb_module)
                vars(bags).update(
                    host_tables=tables, pooled_type=own_type, gradient_scale=1.0, defers_lookup=False, _deferred=None
                )


def round_lookups(model: nn.Module, pooled_type: torch.dtype) -> None:
    """Sets the type in which FBGEMM's lookups on a GPU give pooled rows that are whole; sums stay in float32.

    All ranks must give the same. bfloat16 halves the traffic in memory and on the network.
    """
    for lookup, own_type in _set_pooled_types(model, pooled_type):
        for bags in getattr(lookup, "_emb_modules", ()):
            if own_type != torch.float32:
                bags.emb_module.output_dtype = SparseType.from_dtype(own_type).as_int()


def _set_pooled_types(model: nn.Module, pooled_type: torch.dtype) -> Iterator[tuple[nn.Module, torch.dtype]]:
    """Each lookup with the type of its pooled rows: `pooled_type`, or float32 if they are still to be summed."""
    for module in model.modules():
        for lookup, sharding_type in zip(
            getattr(module, "_lookups", ()), getattr(module, "_sharding_types", ()), strict=False
        ):
            own_type = pooled_type if sharding_type in _WHOLE_ROWS else torch.float32
            if hasattr(lookup, "_dummy_embs_tensor"):  # a rank without tables sends this
                lookup._dummy_embs_tensor = lookup._dummy_embs_tensor.detach().to(own_type).requires_grad_()
            yield lookup, own_type
