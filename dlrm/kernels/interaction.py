"""Pairwise dot products of a sample's vectors, fused.

Shapes: B samples, D embedding dimension, V vectors, P = V * (V - 1) / 2 pairs. Vector 0 is the dense one. The others
are blocks of D columns of `sources`: those of the first source, in the order of `columns`, then those of the second.
"""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from dlrm.kernels.native import has_native
from dlrm.kernels.sizes import MOST_TRITON_VECTORS


def dot_interaction(
    dense_BD: torch.Tensor,
    sources: Sequence[torch.Tensor],
    columns: Sequence[Sequence[int]],
    *,
    may_overwrite: bool = False,
) -> torch.Tensor:
    """The dense vector beside the dot product of each pair of vectors (arXiv:1906.00091, section 2.1.3).

    Args:
        dense_BD: float32 or bfloat16; the result has the same type.
        sources: matrices of B rows, each float32 or bfloat16.
        columns: for each source the first column of each vector in it. Vectors must not overlap.
        may_overwrite: whether backward may write gradients over the sources. The caller must not read them afterwards.
            Backward does so if each column belongs to a vector, which saves as much memory as the sources take.

    Returns:
        [B, D + P]; pairs (0, 1), (0, 2), ..., (1, 2), .... Sums are in float32.
    """
    if dense_BD.is_cpu and dense_BD.dtype in (torch.float32, torch.bfloat16) and has_native():
        flat = [number for starts in columns for number in (len(starts), *starts)]
        overwrites = may_overwrite and all(
            source.is_contiguous() and not source.is_leaf and source.size(1) == len(starts) * dense_BD.size(1)
            for source, starts in zip(sources, columns, strict=True)
        )
        return _NativeInteraction.apply(flat, overwrites, dense_BD, *sources)
    if dense_BD.is_cuda and _is_for_triton(dense_BD, sources, columns):
        from dlrm.kernels.triton_interaction import triton_dot_interaction  # not at the top: it needs Triton

        return triton_dot_interaction(dense_BD, sources, columns)
    return plain_dot_interaction(dense_BD, sources, columns)


def _is_for_triton(dense_BD: torch.Tensor, sources: Sequence[torch.Tensor], columns: Sequence[Sequence[int]]) -> bool:
    dtypes = {tensor.dtype for tensor in (dense_BD, *sources)}
    num_vectors = 1 + sum(len(starts) for starts in columns)
    return dtypes <= {torch.float32, torch.bfloat16} and 2 <= num_vectors <= MOST_TRITON_VECTORS and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class _NativeInteraction(torch.autograd.Function):
    """Neither all V x V products nor the concatenated vectors are ever in memory."""

    @staticmethod
    def forward(
        ctx: Any, columns: list[int], overwrites: bool, dense_BD: torch.Tensor, *sources: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(dense_BD, *sources)
        ctx.columns, ctx.overwrites = columns, overwrites
        return torch.ops.dlrm.interact(dense_BD, sources, columns)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dense_BD, *sources = ctx.saved_tensors
        if not ctx.overwrites:
            return None, None, *torch.ops.dlrm.interact_backward(grad_outputs[0], dense_BD, sources, ctx.columns)
        gradient_BD = torch.ops.dlrm.interact_backward_(grad_outputs[0], dense_BD, sources, ctx.columns)
        # If another function has saved the sources, autograd now refuses to use them, since they were overwritten.
        torch.autograd.graph.increment_version(sources)
        return None, None, gradient_BD, *(source.detach() for source in sources)


def plain_dot_interaction(
    dense_BD: torch.Tensor, sources: Sequence[torch.Tensor], columns: Sequence[Sequence[int]]
) -> torch.Tensor:
    """The same in PyTorch, on any device."""
    vectors = take_vectors(dense_BD.size(1), sources, columns)
    vectors_BVD = torch.stack([dense_BD, *(vector_BD.to(dense_BD.dtype) for vector_BD in vectors)], dim=1)
    return torch.cat((dense_BD, _PairwiseDots.apply(vectors_BVD)), dim=1)


def take_vectors(dim: int, sources: Sequence[torch.Tensor], columns: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Each vector that `columns` names, [B, D].

    A source is split once if it is cut into blocks of D columns. Otherwise each vector is a slice, and the gradient of
    each slice is as large as the whole source.
    """
    vectors: list[torch.Tensor] = []
    for source, starts in zip(sources, columns, strict=True):
        if source.size(1) % dim or any(start % dim for start in starts):
            vectors.extend(source[:, start : start + dim] for start in starts)
        else:
            blocks = source.split(dim, dim=1)
            vectors.extend(blocks[start // dim] for start in starts)
    return vectors


class _PairwiseDots(torch.autograd.Function):
    """The dot product of each pair of a sample's vectors.

    Autograd would differentiate both factors of V V^T and add the results. With the products' gradient spread to a
    symmetric matrix G, that of V is G V: one batched product instead of two, and no sum.
    """

    @staticmethod
    def forward(ctx: Any, vectors_BVD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(vectors_BVD)
        cell_of_pair, _ = _places(vectors_BVD.size(1), vectors_BVD.device)
        return torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2)).flatten(1).index_select(1, cell_of_pair)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        (vectors_BVD,) = ctx.saved_tensors
        size = vectors_BVD.size(1)
        _, pair_of_cell = _places(size, vectors_BVD.device)
        padded = torch.nn.functional.pad(grad_outputs[0], (0, 1))  # read for the diagonal, which is not a pair
        return torch.bmm(padded.index_select(1, pair_of_cell).unflatten(1, (size, size)), vectors_BVD)


@cache
def _places(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The cell of each pair in the flat matrix of `size` vectors' products, and the pair of each cell."""
    rows, columns = torch.triu_indices(size, size, offset=1, device=device)
    pair_of_cell = torch.full((size, size), len(rows), device=device)
    pair_of_cell[rows, columns] = pair_of_cell[columns, rows] = torch.arange(len(rows), device=device)
    return rows * size + columns, pair_of_cell.flatten()
