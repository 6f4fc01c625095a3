"""Linear layers with ReLU, forward and backward in one step each.

Shapes: B samples, N outputs, K inputs of a layer.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn.functional import linear, relu

from dlrm.kernels.native import has_native

IntegerFormat = Literal["int16", "int8"]
"""What matrix products can go through."""

ACTIVATIONS = {"int16": torch.float32, "int8": torch.bfloat16}
"""What goes into them, and comes out."""

LEAST_INTEGER_SIZE = 64
"""Of a layer's inputs and outputs: narrower layers gain nothing from integer products, or lose."""


def mlp(
    input_B: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    *,
    through: IntegerFormat | None = None,
) -> torch.Tensor:
    """Each layer a matrix product, a bias and a ReLU; matrix products in autocast's type under autocast.

    Args:
        input_B: [B, in_features] float32 or bfloat16.
        weights: of each layer, [out_features, in_features] float32.
        biases: of each layer, [out_features] float32.
        through: integers that products go through where a layer is wide enough, on CPUs for which
            torch.ops.dlrm.has_vnni() holds. It decides on the type of the activations.

    Returns:
        [B, out_features of the last layer].

    Raises:
        RuntimeError: for integers without the compiled operators, or on a CPU without AVX-512 VNNI.
    """
    # torch.compile fuses what lies between the products itself.
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
    """What lies between two matrix products is one pass over the activations, in place."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, through: IntegerFormat | None, input_B: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        weights = [weight.to(dtype) for weight in parameters[::2]]
        activations = [input_B.to(dtype).contiguous()]
        with torch.autocast("cpu", enabled=False):
            for weight, bias in zip(weights, parameters[1::2], strict=True):
                activations.append(_linear(activations[-1], weight, bias, _format_for(weight, through)))
        ctx.save_for_backward(*weights, *activations)
        ctx.through, ctx.input_dtype = through, input_B.dtype
        return activations[-1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        num_layers = len(ctx.saved_tensors) // 2
        weights, activations = ctx.saved_tensors[:num_layers], ctx.saved_tensors[num_layers:]
        gradients: list[torch.Tensor] = []
        grad_B = grad_outputs[0].to(activations[-1].dtype, copy=True, memory_format=torch.contiguous_format)
        grad_bias = torch.ops.dlrm.mask_(grad_B, activations[-1])
        for layer in reversed(range(num_layers)):
            weight, input_B, through = weights[layer], activations[layer], _format_for(weights[layer], ctx.through)
            gradients[:0] = [_grad_weight(grad_B, input_B, through), grad_bias]
            if layer > 0:
                grad_B, grad_bias = _grad_hidden(grad_B, weight, input_B, through)
                if grad_B is input_B:  # a second backward pass is told so
                    torch.autograd.graph.increment_version(input_B)
        grad_input_B = None
        if ctx.needs_input_grad[2]:
            grad_input_B = _grad_input(grad_B, weights[0], _format_for(weights[0], ctx.through)).to(ctx.input_dtype)
        return None, None, grad_input_B, *gradients


def _format_for(weight_NK: torch.Tensor, through: IntegerFormat | None) -> IntegerFormat | None:
    return through if min(weight_NK.shape) >= LEAST_INTEGER_SIZE else None


def _linear(
    input_BK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor, through: IntegerFormat | None
) -> torch.Tensor:
    if through is not None:
        return getattr(torch.ops.dlrm, f"{through}_linear")(input_BK, weight_NK, bias_N, True)
    output_BN = torch.mm(input_BK, weight_NK.t())
    torch.ops.dlrm.add_bias_(output_BN, bias_N, True)
    return output_BN


def _grad_weight(grad_BN: torch.Tensor, input_BK: torch.Tensor, through: IntegerFormat | None) -> torch.Tensor:
    if through is not None:
        return getattr(torch.ops.dlrm, f"{through}_grad_weight")(grad_BN, input_BK)
    return torch.mm(grad_BN.t(), input_BK).float()


def _grad_input(grad_BN: torch.Tensor, weight_NK: torch.Tensor, through: IntegerFormat | None) -> torch.Tensor:
    if through is not None:
        return getattr(torch.ops.dlrm, f"{through}_grad_input")(grad_BN, weight_NK)
    return torch.mm(grad_BN, weight_NK)


def _grad_hidden(
    grad_BN: torch.Tensor, weight_NK: torch.Tensor, activation_BK: torch.Tensor, through: IntegerFormat | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient [B, K] before the ReLU that the activation came from, maybe in its place, and its sum over B."""
    if through is not None:
        getattr(torch.ops.dlrm, f"{through}_masked_grad_input_")(grad_BN, weight_NK, activation_BK)
        return activation_BK, torch.ops.dlrm.mask_(activation_BK, None)
    gradient_BK = torch.mm(grad_BN, weight_NK)
    return gradient_BK, torch.ops.dlrm.mask_(gradient_BK, activation_BK)


def plain_mlp(input_B: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same in PyTorch, on any device."""
    for weight, bias in zip(weights, biases, strict=True):
        input_B = relu(linear(input_B, weight, bias))
    return input_B
