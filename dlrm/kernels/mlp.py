"""Linear layers with ReLU, forward and backward in one step each.

Shapes: B samples, N outputs, K inputs of a layer.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, relu

from dlrm.kernels.gradient_memory import memory_for_gradient
from dlrm.kernels.native import has_native

IntegerFormat = Literal["int16", "int8"]
"""The integers that matrix products can go through."""

ACTIVATIONS = {"int16": torch.float32, "int8": torch.bfloat16}
"""The type of the activations for each of them."""

LEAST_INTEGER_SIZE = 64
"""A layer with fewer inputs or outputs than this gains nothing from integer products, or gets slower."""


def mlp(
    input_B: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    through: IntegerFormat | None = None,
) -> torch.Tensor:
    """Layers of a matrix product, a bias and a ReLU each. Under autocast, the products have autocast's type.

    Args:
        input_B: [B, in_features] float32 or bfloat16.
        weights: [out_features, in_features] float32 for each layer.
        biases: [out_features] float32 for each layer.
        through: the integers that the products of wide enough layers go through, on CPUs for which
            torch.ops.dlrm.has_vnni() holds. The type of the activations follows from it.

    Returns:
        [B, out_features of the last layer].

    Raises:
        RuntimeError: if integers are asked for without the compiled operators, or on a CPU without AVX-512 VNNI.
    """
    # torch.compile itself fuses what lies between the products.
    if torch.compiler.is_compiling() or not (input_B.is_cpu and has_native()):
        if through is not None:
            raise RuntimeError(
                f"{through} products: expected CPU tensors, the compiled operators, and no torch.compile"
            )
        return plain_mlp(input_B, weights, biases)
    if through is not None:
        dtype = ACTIVATIONS[through]
    else:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    layers = (part for layer in zip(weights, biases, strict=True) for part in layer)
    return _NativeMlp.apply(dtype, through, input_B, *layers)


class _NativeMlp(torch.autograd.Function):
    """Between two matrix products, the activations are passed over once, in place, or not at all."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, through: IntegerFormat | None, input_B: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        is_wide = [min(weight.shape) >= LEAST_INTEGER_SIZE for weight in parameters[::2]]
        formats = [through if through is not None and wide else "" for wide in is_wide]
        weights = [weight.to(dtype) for weight in parameters[::2]]
        given_B = input_B.to(dtype).contiguous()
        outputs = torch.ops.dlrm.mlp.default(given_B, weights, parameters[1::2], formats)
        ctx.save_for_backward(given_B, *weights, *outputs)
        ctx.parameters, ctx.formats, ctx.input_dtype = parameters, formats, input_B.dtype
        return outputs[-1]

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        given_B, *saved = ctx.saved_tensors
        weights, outputs = saved[: len(ctx.formats)], saved[len(ctx.formats) :]
        gradients = [memory_for_gradient(parameter) for parameter in ctx.parameters]
        needs_input = ctx.needs_input_grad[2]
        grad_input = torch.ops.dlrm.mlp_backward.default(
            grad_outputs[0], given_B, outputs, weights, gradients, ctx.formats, needs_input
        )
        return None, None, grad_input[0].to(ctx.input_dtype) if needs_input else None, *gradients


def plain_mlp(input_B: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in PyTorch, on any device."""
    for weight, bias in zip(weights, biases, strict=True):
        input_B = relu(linear(input_B, weight, bias))
    return input_B
