"""Precision in which embeddings and their gradients travel."""

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType

from dlrm.sharding.sharder import ScaledCodec, TableSharder, gradient_scale


@pytest.mark.parametrize("batch_size", [1, 3, 256, 8192, 65_536])
@pytest.mark.parametrize("largest", [1e-4, 1.0, 60.0])
def test_gradients_of_any_batch_survive_fp16(batch_size: int, largest: float) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(10_000, generator=generator).clamp(-2, 2) * largest / batch_size
    codec = ScaledCodec(SparseType.FP16, gradient_scale(batch_size), is_forward=False)
    sent = codec.encode(gradients)
    assert sent.dtype == torch.float16
    torch.testing.assert_close(codec.decode(sent), gradients, rtol=2e-3, atol=1e-6 * largest / batch_size)


def test_what_is_too_large_is_clamped() -> None:
    codec = ScaledCodec(SparseType.FP16, gradient_scale(1), is_forward=False)
    assert codec.decode(codec.encode(torch.tensor([1e9]))).item() == pytest.approx(255.9, rel=1e-3)


def test_nothing_is_quantized_unless_asked_for() -> None:
    assert TableSharder().qcomm_codecs_registry is None
    registry = TableSharder("bf16", "fp16", batch_size=8).qcomm_codecs_registry
    assert registry is not None
    for codecs in registry.values():
        assert codecs.forward.quantized_dtype == torch.bfloat16
        assert codecs.backward.quantized_dtype == torch.float16
