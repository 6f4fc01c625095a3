"""Where a parameter's gradient is written: into its bucket, if there is one, so that nobody need copy it there."""

import torch


def offer_memory(parameter: torch.Tensor, memory: torch.Tensor | None) -> None:
    """Has the next gradient of `parameter` written into `memory`, a float32 tensor of its shape; None: no longer.

    That gradient lasts until the next mean of its bucket, also where it was asked for by torch.autograd.grad.
    """
    parameter.offered_memory = memory  # type: ignore[attr-defined]


def memory_for_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """What was offered, once; new memory where nothing was, or where what was offered may hold a gradient."""
    memory = vars(parameter).pop("offered_memory", None)
    if memory is None or parameter.grad is not None:
        return torch.empty_like(parameter, memory_format=torch.contiguous_format)
    return memory.detach()  # a tensor that nobody else refers to: autograd would copy it otherwise
