"""A loss, and its gradients, some samples at a time: activations of a whole batch are never in memory.

Shapes: B samples, W columns of their pooled rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

LossOfPiece = Callable[[slice, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes a slice of the batch and the pooled rows of its samples; gives their loss and logits. Losses add up."""


def loss_in_pieces(
    loss_of: LossOfPiece, rows: int, pooled_BW: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and logits of a whole batch, `rows` samples at a time: each piece's backward follows its forward.

    Gradients of parameters become sums over pieces, which are rounded differently from one sum over the batch.

    Args:
        loss_of: called under the caller's autocast. In its backward pass it may write over the pooled rows.
        rows: of a piece at most.
        pooled_BW: becomes the gradients of the loss, and can't be used again.
        parameters: that `loss_of` uses.

    Returns:
        The loss, and the logits of all samples, which are not differentiable.

    Raises:
        RuntimeError: from a second backward pass.
    """
    pieces = [slice(first, min(first + rows, len(pooled_BW))) for first in range(0, len(pooled_BW), rows)]
    if torch.is_grad_enabled():
        return _LossInPieces.apply(loss_of, pieces, pooled_BW, *parameters)
    losses, logits = zip(*(loss_of(piece, pooled_BW[piece]) for piece in pieces), strict=True)
    return torch.stack(losses).sum(), torch.cat(logits)


class _LossInPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loss_of: LossOfPiece, pieces: list[slice], pooled_BW: torch.Tensor, *parameters: torch.nn.Parameter
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The gradients are computed here, in the forward pass, so that only one piece's activations are in memory:
        #
        #   piece 0   forward -> backward -> gradient of pooled rows over the pooled rows of piece 0
        #   piece 1             forward -> backward -> ...                         of piece 1; parameters' are added up
        #
        # `backward` then only hands on what is ready, times the gradient of the loss. Whoever still held `pooled_BW`
        # would read gradients: its version is raised, so that autograd refuses that.
        sums: tuple[torch.Tensor, ...] = ()
        losses, all_logits = [], []
        for piece in pieces:
            leaf = pooled_BW[piece].detach().requires_grad_()
            with torch.enable_grad():
                loss, logits = loss_of(piece, leaf.view_as(leaf))  # what is no leaf may be written over
            with torch.autocast(pooled_BW.device.type, enabled=False):
                grad_pooled, *gradients = torch.autograd.grad(loss, (leaf, *parameters))
            if grad_pooled.data_ptr() != leaf.data_ptr():
                leaf.detach().copy_(grad_pooled)
            if sums:
                torch._foreach_add_(sums, gradients)
            else:
                sums = tuple(gradients)
            losses.append(loss.detach())
            all_logits.append(logits.detach())
        ctx.gradients = (pooled_BW.detach(), *sums)
        torch.autograd.graph.increment_version(pooled_BW)
        logits = torch.cat(all_logits)
        ctx.mark_non_differentiable(logits)
        return torch.stack(losses).sum(), logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("gradients of a loss in pieces: expected one backward pass, got a second one")
        gradients, ctx.gradients = ctx.gradients, None
        if (scale := grad_outputs[0].item()) != 1:
            torch._foreach_mul_(gradients, scale)
        return None, None, *gradients
