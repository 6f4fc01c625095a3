"""Meta functions of the compiled operators: shapes and types of their results, for torch.compile and FakeTensor."""

import threading
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.library import register_fake

_REGISTERING = threading.Lock()


def register_meta_functions() -> None:
    """Call it when the operators are loaded. Calls after the first do nothing."""
    # Two threads may call at the same time, as when they draw a model's tables: a cache alone would let both in.
    with _REGISTERING:
        _register()


@cache
def _register() -> None:
    for name in ("pool", "update", "add_bias_", "draw_"):
        register_fake(f"dlrm::{name}", _nothing)
    register_fake("dlrm::interact", _interact)
    register_fake("dlrm::interact_backward", _interact_backward)
    register_fake("dlrm::interact_backward_", _interact_backward_in_place)
    register_fake("dlrm::mask_", _mask)
    for integers in ("int16", "int8"):
        register_fake(f"dlrm::{integers}_linear", _linear)
        register_fake(f"dlrm::{integers}_grad_input", _grad_input)
        register_fake(f"dlrm::{integers}_masked_grad_input_", _nothing)
        register_fake(f"dlrm::{integers}_grad_parameters", _nothing)
    register_fake("dlrm::mlp", _mlp)
    register_fake("dlrm::mlp_backward", _mlp_backward)


def _nothing(*_: object) -> None:
    return None


def _interact(dense: Tensor, others: Sequence[Tensor], columns: Sequence[int]) -> Tensor:
    vectors = 1 + len(columns) - len(others)  # `columns` also has a count for each matrix
    return dense.new_empty(dense.size(0), dense.size(1) + vectors * (vectors - 1) // 2)


def _interact_backward(
    gradient: Tensor, dense: Tensor, others: Sequence[Tensor], columns: Sequence[int]
) -> list[Tensor]:
    del gradient, columns
    return [torch.empty_like(matrix, memory_format=torch.contiguous_format) for matrix in (dense, *others)]


def _interact_backward_in_place(
    gradient: Tensor, dense: Tensor, others: Sequence[Tensor], columns: Sequence[int]
) -> Tensor:
    del gradient, others, columns
    return torch.empty_like(dense, memory_format=torch.contiguous_format)


def _mask(gradient: Tensor, output: Tensor | None) -> Tensor:
    del output
    return gradient.new_empty(gradient.size(1), dtype=torch.float32)


def _linear(input: Tensor, weight: Tensor, bias: Tensor, rectified: bool) -> Tensor:  # noqa: A002 - the operator's name
    del bias, rectified
    return input.new_empty(input.size(0), weight.size(0))


def _grad_input(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty(gradient.size(0), weight.size(1))


def _mlp(
    input: Tensor,  # noqa: A002 - the operator's name
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    formats: Sequence[str],
) -> list[Tensor]:
    del biases, formats
    return [input.new_empty(input.size(0), weight.size(0)) for weight in weights]


def _mlp_backward(
    grad_output: Tensor,
    input: Tensor,  # noqa: A002 - the operator's name
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    formats: Sequence[str],
    needs_input: bool,
) -> list[Tensor]:
    del grad_output, outputs, weights, gradients, formats
    return [torch.empty_like(input, memory_format=torch.contiguous_format)] if needs_input else []
