"""What kernels are held against: the same in float64, without kernels.

Shapes: B samples, D embedding dimension, V vectors that interact, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def dot_interaction_in_float64(dense_BD: Tensor, sources: Sequence[Tensor], columns: Sequence[Sequence[int]]) -> Tensor:
    """The dense vector beside each pair's dot product, of vectors in the precision of `dense_BD`."""
    dim = dense_BD.size(1)
    blocks = [source[:, first : first + dim] for source, own in zip(sources, columns, strict=True) for first in own]
    vectors_BVD = torch.stack([dense_BD, *(block.to(dense_BD.dtype) for block in blocks)], dim=1).double()
    size = vectors_BVD.size(1)
    rows, others = torch.triu_indices(size, size, 1)
    products_BVV = torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))
    return torch.cat((dense_BD.double(), products_BVV[:, rows, others]), dim=1)


@dataclass(frozen=True)
class InteractionCase:
    """Inputs of an interaction by their sizes."""

    batch_size: int
    dim: int
    columns: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    dense: torch.dtype = torch.float32
    sources: tuple[torch.dtype, ...] = (torch.float32,)

    def draw(self, device: str, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        """Random inputs that require gradients, the same for a case."""
        generator = torch.Generator().manual_seed(7)

        def tensor(width: int, dtype: torch.dtype) -> Tensor:
            drawn = scale * torch.randn(self.batch_size, width, generator=generator)
            return drawn.to(device, dtype).requires_grad_()

        dense_BD = tensor(self.dim, self.dense)
        return dense_BD, [tensor(w, dtype) for w, dtype in zip(self.widths, self.sources, strict=True)]


BF16, FP32 = torch.bfloat16, torch.float32
INTERACTION_CASES = {
    "two vectors": InteractionCase(5, 16, ((0,),), (16,)),
    "27 vectors, one source": InteractionCase(9, 32, (tuple(range(0, 26 * 32, 32)),), (26 * 32,)),
    "64 vectors": InteractionCase(3, 8, (tuple(range(0, 63 * 8, 8)),), (63 * 8,)),
    "another order": InteractionCase(4, 20, ((40, 0, 20),), (60,)),
    "idle columns, odd ones": InteractionCase(6, 12, ((31, 2),), (47,)),
    "three sources": InteractionCase(7, 24, ((24, 0), (48, 0, 24), (0,)), (48, 72, 24), FP32, (FP32, FP32, FP32)),
    "wide": InteractionCase(3, 200, ((0, 200, 400),), (600,)),
    "bf16": InteractionCase(5, 128, (tuple(range(0, 26 * 128, 128)),), (26 * 128,), BF16, (BF16,)),
    "bf16 from fp32": InteractionCase(5, 64, ((0, 64), (64, 0)), (128, 128), BF16, (FP32, BF16)),
    "fp32 from bf16": InteractionCase(5, 64, ((0, 64),), (128,), FP32, (BF16,)),
    "no sample": InteractionCase(0, 16, ((0, 16),), (32,)),
}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected; inf for what is not finite."""
    if not expected.numel():
        return 0.0
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
    return error.item() if error.isfinite() else float("inf")
