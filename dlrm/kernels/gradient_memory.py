"""Memory for a parameter's gradient: its place in DistributedDataParallel's bucket, so that it is not copied there."""

import torch


def offer_memory(parameter: torch.Tensor, memory: torch.Tensor | None) -> None:
    """The next gradient of `parameter` is written into `memory`. None withdraws the offer.

    The gradient is overwritten by the next mean of its bucket, even if torch.autograd.grad returned it.

    Args:
        parameter: a float32 parameter.
        memory: a float32 tensor of its shape.
    """
    parameter.offered_memory = memory  # type: ignore[attr-defined]


def memory_for_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The memory that was offered, which is used up by this call. New memory if there is none, or if `parameter` has a
    gradient already, which the offered memory may hold.
    """
    memory = vars(parameter).pop("offered_memory", None)
    if memory is None or parameter.grad is not None:
        return torch.empty_like(parameter, memory_format=torch.contiguous_format)
    return memory.detach()  # a new tensor: autograd copies a gradient that something else refers to
