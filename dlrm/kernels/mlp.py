"""Linear layers with ReLU, forward and backward in one step each.

Shapes: B samples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear, relu

from dlrm.kernels.native import has_native


def mlp(input_B: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each layer a matrix product, a bias and a ReLU; matrix products in autocast's type under autocast.

    Args:
        input_B: [B, in_features] float32 or bfloat16.
        weights: of each layer, [out_features, in_features] float32.
        biases: of each layer, [out_features] float32.

    Returns:
        [B, out_features of the last layer].
    """
    # torch.compile fuses what lies between the products itself.
    if torch.compiler.is_compiling() or not (input_B.is_cpu and has_native()):
        return plain_mlp(input_B, weights, biases)
    is_cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_cast else torch.float32
    return _NativeMlp.apply(dtype, input_B, *(part for layer in zip(weights, biases, strict=True) for part in layer))


class _NativeMlp(torch.autograd.Function):
    """What lies between two matrix products is one pass over the activations, in place."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, input_B: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weights = [weight.to(dtype) for weight in parameters[::2]]
        activations = [input_B.to(dtype).contiguous()]
        with torch.autocast("cpu", enabled=False):
            for weight, bias in zip(weights, parameters[1::2], strict=True):
                output = torch.mm(activations[-1], weight.t())
                torch.ops.dlrm.add_bias_(output, bias, True)
                activations.append(output)
        ctx.save_for_backward(*weights, *activations)
        ctx.input_dtype = input_B.dtype
        return activations[-1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        num_layers = len(ctx.saved_tensors) // 2
        weights, activations = ctx.saved_tensors[:num_layers], ctx.saved_tensors[num_layers:]
        gradients: list[torch.Tensor] = []
        grad_B = grad_outputs[0].to(activations[-1].dtype, copy=True, memory_format=torch.contiguous_format)
        for layer in reversed(range(num_layers)):
            grad_bias = torch.ops.dlrm.mask_(grad_B, activations[layer + 1])
            grad_weight = torch.mm(grad_B.t(), activations[layer]).float()
            gradients[:0] = [grad_weight, grad_bias]
            if layer > 0 or ctx.needs_input_grad[1]:
                grad_B = torch.mm(grad_B, weights[layer])
        return None, grad_B.to(ctx.input_dtype) if ctx.needs_input_grad[1] else None, *gradients


def plain_mlp(input_B: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in PyTorch, on any device."""
    for weight, bias in zip(weights, biases, strict=True):
        input_B = relu(linear(input_B, weight, bias))
    return input_B
