"""How a collection of tables is sharded: in which ways, and in what precision embeddings travel."""

from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
from torchrec.distributed.types import CommOp, QuantizedCommCodecs

from dlrm.config import CommPrecision


class TableSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, with every sharding type on a CPU too.

    TorchRec offers the row-wise types on GPUs alone. All that they need, a reduce-scatter, gloo has by now (2026-11-23:
    torch 2.13); tests hold them to one rank's losses.
    """

    def __init__(
        self, forward: CommPrecision = "fp32", backward: CommPrecision = "fp32", *, prefetches: bool = False
    ) -> None:
        """Makes a sharder.

        Args:
            forward: precision in which pooled embeddings travel.
            backward: precision in which their gradients do.
            prefetches: cache lines stay locked until the step that they were fetched for is over.
        """
        super().__init__(
            fused_params={"prefetch_pipeline": True} if prefetches else None,
            qcomm_codecs_registry=_codecs(forward, backward),
        )

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002
        """All of them, whatever the device."""
        return super().sharding_types("cuda")


def _codecs(forward: CommPrecision, backward: CommPrecision) -> dict[str, QuantizedCommCodecs] | None:
    """Of pooled embeddings, and of their gradients on the way back; None where nothing is quantized.

    TorchRec's own registry turns bf16 into fp16 on a CPU, where gloo carries both.
    """
    if forward == backward == "fp32":
        return None
    config = QCommsConfig(CommType(forward), CommType(backward))
    operations = (CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL, CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER)
    return {operation.name: get_qcomm_codecs(config) for operation in operations}
