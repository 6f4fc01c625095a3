"""How a collection of tables is sharded: in which ways, and in what precision embeddings travel."""

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

    TorchRec offers the row-wise types on GPUs alone. All that they need, a reduce-scatter, gloo has by now (2026-11-23:
    torch 2.13); tests hold them to one rank's losses.
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
            forward: precision in which pooled embeddings travel.
            backward: precision in which their gradients do.
            batch_size: samples of a rank in a step, over which gradients are averaged.
            activations: what the model computes with; pooled rows that are final are in it.
            prefetches: cache lines stay locked until the step that they were fetched for is over.
        """
        self.pooled_type = torch.bfloat16 if activations == "bf16" and forward == backward == "fp32" else torch.float32
        super().__init__(
            fused_params={"prefetch_pipeline": True} if prefetches else None,
            qcomm_codecs_registry=_codecs(forward, backward, batch_size),
        )

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        """All of them, whatever the device."""
        return super().sharding_types("cuda")


class ScaledCodec(QuantizedCommCodec):
    """FBGEMM's codec with its argument scaled on the way, undone in fp32: its own scale is taken off in fp16."""

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
    """A power of two that brings averages over a batch into fp16's range, 6e-8 to 65,504.

    A sample's gradient is divided by the batch size; 256 more leaves room on both sides.
    """
    return 256.0 * 2 ** math.ceil(math.log2(batch_size))


def _codecs(forward: CommPrecision, backward: CommPrecision, batch_size: int) -> dict[str, QuantizedCommCodecs] | None:
    """Of pooled embeddings, and of their gradients on the way back; None where nothing is quantized.

    TorchRec's own registry turns bf16 into fp16 on a CPU, where gloo carries both.
    """
    if forward == backward == "fp32":
        return None
    scale = gradient_scale(batch_size) if backward == "fp16" else 1.0
    codecs = QuantizedCommCodecs(
        ScaledCodec(SparseType(forward), 1.0, is_forward=True),  # type: ignore[arg-type] # what TorchRec's own is too
        ScaledCodec(SparseType(backward), scale, is_forward=False),  # type: ignore[arg-type]
    )
    return dict.fromkeys(
        (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL.name, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER.name), codecs
    )
