"""Pairwise dot products of a sample's vectors in one Triton kernel forward and one backward.

Each program keeps a few samples' vectors on the chip: neither the V x V products nor the concatenated vectors are ever
in the device's memory.

Shapes: B samples, D embedding dimension, V vectors that interact, P = V * (V - 1) / 2 pairs, W columns of a source.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlrm.kernels.sizes import MOST_TRITON_VECTORS

DTYPES = (torch.float32, torch.bfloat16)
SAMPLES_PER_PROGRAM: int = 1
NUM_WARPS: int = 4
_LEAST_TILE = 16  # of a matrix product
_MOST_COLUMNS = 128  # of a tile of vectors; wider vectors take several tiles, one after the other
_WIDEST_LOAD = 16  # elements


def triton_dot_interaction(dense_BD: Tensor, sources: Sequence[Tensor], columns: Sequence[Sequence[int]]) -> Tensor:
    """The dense vector beside the dot product of each pair of vectors.

    Vectors are converted to the precision of `dense_BD`, which is also the result's. Products are summed in fp32, and
    go through tf32 if torch's matrix products of fp32 do. The twin is `plain_dot_interaction`.

    Args:
        dense_BD: vector 0; float32 or bfloat16.
        sources: [B, W] each; float32 or bfloat16.
        columns: for each source the first column of each vector in it. Vectors must not overlap.

    Returns:
        [B, D + P], pairs in the order of triu_indices(V, V, 1).

    Raises:
        ValueError: if the kernel does not take these shapes, precisions or columns.
    """
    flat = [column for own in columns for column in own]
    return _forward(dense_BD, list(sources), flat, [len(own) for own in columns])


def _check(dense_BD: Tensor, sources: list[Tensor], columns: list[int], counts: list[int]) -> None:
    widths = tuple(source.size(1) for source in sources)
    _check_columns(tuple(columns), tuple(counts), widths, dense_BD.size(1))
    if any(source.size(0) != dense_BD.size(0) for source in sources):
        raise ValueError(f"sources of {[s.size(0) for s in sources]} samples, expected {dense_BD.size(0)} of each")
    if any(tensor.dtype not in DTYPES for tensor in (dense_BD, *sources)):
        raise ValueError(f"got {dense_BD.dtype} and {[s.dtype for s in sources]}, expected float32 or bfloat16")


@lru_cache(maxsize=64)
def _check_columns(columns: tuple[int, ...], counts: tuple[int, ...], widths: tuple[int, ...], dim: int) -> None:
    if not 2 <= 1 + len(columns) <= MOST_TRITON_VECTORS:
        raise ValueError(f"{1 + len(columns)} vectors, expected 2 to {MOST_TRITON_VECTORS}")
    rest = iter(columns)
    for count, width in zip(counts, widths, strict=True):
        ordered = sorted(islice(rest, count))
        stops = [*ordered[1:], width]
        if any(first < 0 or first + dim > stop for first, stop in zip(ordered, stops, strict=False)):
            raise ValueError(f"columns {ordered}: expected blocks of {dim} that do not overlap within {width} columns")


@torch.library.custom_op("dlrm::triton_dot_interaction", mutates_args=())
def _forward(dense_BD: Tensor, sources: list[Tensor], columns: list[int], counts: list[int]) -> Tensor:
    _check(dense_BD, sources, columns, counts)
    dense_BD, sources = _with_unit_stride(dense_BD, sources)
    batch_size, dim = dense_BD.shape
    num_vectors = 1 + len(columns)
    out_BP = dense_BD.new_empty(batch_size, dim + num_vectors * (num_vectors - 1) // 2)
    if batch_size:
        table = _vector_table(tuple(columns), tuple(counts), dense_BD.device)
        with _device_of(dense_BD):
            _forward_kernel[_grid(batch_size)](
                dense_BD,
                tuple(sources),
                tuple(source.stride(0) for source in sources),
                table,
                out_BP,
                batch_size,
                dense_BD.stride(0),
                **_constants(dense_BD, columns),
            )
    return out_BP


@torch.library.custom_op("dlrm::triton_dot_interaction_backward", mutates_args=())
def _backward(
    grad_BP: Tensor, dense_BD: Tensor, sources: list[Tensor], columns: list[int], counts: list[int]
) -> list[Tensor]:
    dense_BD, sources = _with_unit_stride(dense_BD, sources)
    batch_size = dense_BD.size(0)
    grads = _empty_gradients(dense_BD, sources, counts)
    if batch_size:
        grad_BP = grad_BP.contiguous()
        table = _vector_table(tuple(columns), tuple(counts), dense_BD.device)
        with _device_of(dense_BD):
            _backward_kernel[_grid(batch_size)](
                grad_BP,
                dense_BD,
                tuple(sources),
                tuple(source.stride(0) for source in sources),
                table,
                grads[0],
                tuple(grads[1:]),
                tuple(grad.stride(0) for grad in grads[1:]),
                batch_size,
                dense_BD.stride(0),
                **_constants(dense_BD, columns),
            )
    return grads


@_forward.register_fake
def _(dense_BD: Tensor, sources: list[Tensor], columns: list[int], counts: list[int]) -> Tensor:  # noqa: ARG001
    num_vectors = 1 + len(columns)
    return dense_BD.new_empty(dense_BD.size(0), dense_BD.size(1) + num_vectors * (num_vectors - 1) // 2)


@_backward.register_fake
def _(
    grad_BP: Tensor,  # noqa: ARG001
    dense_BD: Tensor,
    sources: list[Tensor],
    columns: list[int],  # noqa: ARG001
    counts: list[int],
) -> list[Tensor]:
    return _empty_gradients(dense_BD, sources, counts)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    dense_BD, sources, ctx.columns, ctx.counts = inputs
    ctx.save_for_backward(dense_BD, *sources)


def _differentiate(ctx: Any, grad_BP: Tensor) -> tuple[Tensor, list[Tensor], None, None]:
    dense_BD, *sources = ctx.saved_tensors
    grad_dense_BD, *grads = _backward(grad_BP, dense_BD, sources, ctx.columns, ctx.counts)
    return grad_dense_BD, grads, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def _empty_gradients(dense_BD: Tensor, sources: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Memory for the dense vector's gradient, then for the sources'. A source with columns of no vector gets zeros."""
    dim = dense_BD.size(1)
    grads = [dense_BD.new_empty(dense_BD.shape)]
    for source, count in zip(sources, counts, strict=True):
        create = source.new_empty if count * dim == source.size(1) else source.new_zeros
        grads.append(create(source.shape))
    return grads


def _with_unit_stride(dense_BD: Tensor, sources: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The tensors with the elements of each row side by side; rows may be any distance apart."""
    first, *rest = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (dense_BD, *sources))
    return first, rest


@lru_cache(maxsize=64)
def _vector_table(columns: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """[2, V]: for each vector its source (0 is the dense matrix) and its first column there."""
    owners = [0] + [number for number, count in enumerate(counts, start=1) for _ in range(count)]
    # If the first call comes from a trace, the tensor must not become a fake one, since it is cached.
    with torch.inference_mode(False), torch._C._DisableTorchDispatch():
        return torch.tensor([owners, [0, *columns]], dtype=torch.int32).to(device)


def _device_of(tensor: Tensor) -> Any:
    return torch.cuda.device_of(tensor)


def _grid(batch_size: int) -> tuple[int]:
    return (triton.cdiv(batch_size, SAMPLES_PER_PROGRAM),)


def _constants(dense_BD: Tensor, columns: list[int]) -> dict[str, Any]:
    dim, num_vectors = dense_BD.size(1), 1 + len(columns)
    tf32 = dense_BD.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return {
        "D": dim,
        "V": num_vectors,
        "TILE_V": max(_LEAST_TILE, triton.next_power_of_2(num_vectors)),
        "TILE_D": min(_MOST_COLUMNS, max(_LEAST_TILE, triton.next_power_of_2(dim))),
        "SAMPLES": SAMPLES_PER_PROGRAM,
        "PRECISION": "tf32" if tf32 else "ieee",
        # Triton's interpreter multiplies the bits of bfloat16 as integers (2026-11-23: Triton 3.7). There the kernel
        # converts to fp32 first, which gives the same products.
        "IN_FP32": triton.knobs.runtime.interpret,
        "ALIGNED": math.gcd(_WIDEST_LOAD, *columns),
        "num_warps": NUM_WARPS,
    }


@triton.jit
def _load_vectors(
    dense, sources, source_strides, dense_stride, b, owner_V, column_V, d, D: tl.constexpr, IN_FP32: tl.constexpr
):
    """[TILE_V, TILE_D] of sample `b`, in the dense vector's precision. Each source gives the vectors that it owns."""
    in_D = (d < D)[None, :]
    at_VD = column_V[:, None] + d[None, :]
    tile_VD = tl.load(dense + b * dense_stride + at_VD, mask=(owner_V == 0)[:, None] & in_D, other=0.0)
    for k in tl.static_range(len(sources)):
        is_own_VD = (owner_V == k + 1)[:, None] & in_D
        taken_VD = tl.load(sources[k] + b * source_strides[k] + at_VD, mask=is_own_VD, other=0.0)
        tile_VD = tl.where(is_own_VD, taken_VD.to(tile_VD.dtype), tile_VD)
    return tile_VD.to(tl.float32) if IN_FP32 else tile_VD


@triton.jit
def _pair_of(i, j, V: tl.constexpr):
    """The number of the pair (i, j), i < j, in the order of triu_indices(V, V, 1)."""
    return i * V - i * (i + 1) // 2 + j - i - 1


@triton.jit
def _forward_kernel(
    dense,
    sources,
    source_strides,
    table,
    out,
    batch_size,
    dense_stride,
    D: tl.constexpr,
    V: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_D: tl.constexpr,
    SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_FP32: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    v = tl.arange(0, TILE_V)
    owner_V = tl.load(table + v, mask=v < V, other=-1)
    column_V = tl.multiple_of(tl.load(table + V + v, mask=v < V, other=0), ALIGNED)
    i, j = v[:, None], v[None, :]
    WIDTH: tl.constexpr = D + V * (V - 1) // 2
    for sample in range(SAMPLES):
        b = (tl.program_id(0) * SAMPLES + sample).to(tl.int64)
        if b < batch_size:
            row = out + b * WIDTH
            products_VV = tl.zeros([TILE_V, TILE_V], dtype=tl.float32)
            for first in tl.static_range(0, D, TILE_D):
                d = first + tl.arange(0, TILE_D)
                tile_VD = _load_vectors(
                    dense, sources, source_strides, dense_stride, b, owner_V, column_V, d, D, IN_FP32
                )
                products_VV = tl.dot(tile_VD, tl.trans(tile_VD), products_VV, input_precision=PRECISION)
                dense_D = tl.load(dense + b * dense_stride + d, mask=d < D)
                tl.store(row + d, dense_D, mask=d < D)
            tl.store(row + D + _pair_of(i, j, V), products_VV.to(out.dtype.element_ty), mask=(i < j) & (j < V))


@triton.jit
def _backward_kernel(
    grad,
    dense,
    sources,
    source_strides,
    table,
    grad_dense,
    grad_sources,
    grad_strides,
    batch_size,
    dense_stride,
    D: tl.constexpr,
    V: tl.constexpr,
    TILE_V: tl.constexpr,
    TILE_D: tl.constexpr,
    SAMPLES: tl.constexpr,
    PRECISION: tl.constexpr,
    IN_FP32: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    v = tl.arange(0, TILE_V)
    owner_V = tl.load(table + v, mask=v < V, other=-1)
    column_V = tl.multiple_of(tl.load(table + V + v, mask=v < V, other=0), ALIGNED)
    i, j = v[:, None], v[None, :]
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    WIDTH: tl.constexpr = D + V * (V - 1) // 2
    for sample in range(SAMPLES):
        b = (tl.program_id(0) * SAMPLES + sample).to(tl.int64)
        if b < batch_size:
            row = grad + b * WIDTH
            # The products are those of V V^T. Their gradient G is symmetric with a zero diagonal, so that of V is G V.
            grad_VV = tl.load(row + D + _pair_of(low, high, V), mask=(i != j) & (high < V), other=0.0)
            for first in tl.static_range(0, D, TILE_D):
                d = first + tl.arange(0, TILE_D)
                in_D = (d < D)[None, :]
                tile_VD = _load_vectors(
                    dense, sources, source_strides, dense_stride, b, owner_V, column_V, d, D, IN_FP32
                )
                moved_VD = tl.dot(grad_VV.to(tile_VD.dtype), tile_VD, input_precision=PRECISION)
                kept_D = tl.load(row + d, mask=d < D, other=0.0).to(tl.float32)
                at_VD = column_V[:, None] + d[None, :]
                tl.store(
                    grad_dense + b * D + at_VD,
                    (moved_VD + kept_D[None, :]).to(grad_dense.dtype.element_ty),
                    mask=(owner_V == 0)[:, None] & in_D,
                )
                for k in tl.static_range(len(sources)):
                    tl.store(
                        grad_sources[k] + b * grad_strides[k] + at_VD,
                        moved_VD.to(grad_sources[k].dtype.element_ty),
                        mask=(owner_V == k + 1)[:, None] & in_D,
                    )
