"""How TorchRec shards the tables: the sharding types, and the precision in which embeddings are sent."""

import math
from typing import Literal

import torch
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from dlrm.config.config import CommPrecision


class TableSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, with every sharding type on a CPU too.

    TorchRec offers the row-wise types on GPUs only. On a CPU they need a reduce-scatter, which gloo now has
    (2026-11-23: torch 2.13). Tests compare their losses with one rank's.
    """

    def __init__(
        self,
        forward: CommPrecision = "fp32",
        backward: CommPrecision = "fp32",
        *,
        batch_size: int = 1,
        prefetches: bool = False,
        activations: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Makes a sharder.

        Args:
            forward: precision in which pooled embeddings are sent.
            backward: precision in which their gradients are sent.
            batch_size: samples of a rank in a step, over which gradients are averaged.
            prefetches: whether rows are prefetched; their cache lines then stay locked until their step is over.
            activations: precision of the model's activations; final pooled rows have it.
        """
        self.pooled_type = torch.bfloat16 if activations == "bf16" and forward == backward == "fp32" else torch.float32
        super().__init__(
            fused_params={"prefetch_pipeline": True} if prefetches else None,
            qcomm_codecs_registry=_codecs(forward, backward, batch_size),
        )

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        """All sharding types, whatever the device."""
        return super().sharding_types("cuda")


class ScaledCodec(QuantizedCommCodec):
    """FBGEMM's codec, with its argument scaled before it is sent. The scale is undone in fp32; FBGEMM's own in fp16."""

    def __init__(self, precision: SparseType, scale: float, *, is_forward: bool) -> None:
        super().__init__(precision, is_fwd=is_forward)
        self._scale = scale

    def encode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        """See FBGEMM's codec."""
        return super().encode(input_tensor * self._scale, ctx)

    def decode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        """See FBGEMM's codec."""
        return super().decode(input_tensor, ctx) / self._scale


def gradient_scale(batch_size: int) -> float:
    """A power of two that brings gradients averaged over a batch into fp16's range, 6e-8 to 65,504.

    The average divides a sample's gradient by the batch size. Another factor of 256 leaves room on both sides.
    """
    return 256.0 * 2 ** math.ceil(math.log2(batch_size))


def _codecs(forward: CommPrecision, backward: CommPrecision, batch_size: int) -> dict[str, QuantizedCommCodecs] | None:
    """Codecs of pooled embeddings and of their gradients; None if nothing is quantized.

    TorchRec's own registry turns bf16 into fp16 on a CPU, though gloo can send both.
    """
    if forward == backward == "fp32":
        return None
    scale = gradient_scale(batch_size) if backward == "fp16" else 1.0
    codecs = QuantizedCommCodecs(
        ScaledCodec(SparseType(forward), 1.0, is_forward=True),  # type: ignore[arg-type] # as in TorchRec's own registry
        ScaledCodec(SparseType(backward), scale, is_forward=False),  # type: ignore[arg-type]
    )
    return dict.fromkeys(
        (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name), codecs
    )
