"""Random weights."""

import torch

from dlrm.kernels.native import has_native


def draw_uniform(values: torch.Tensor, bound: float, seed: int) -> None:
    """Fills a contiguous float32 tensor with numbers uniform in +-bound.

    On a CPU these are the numbers of PyTorch's generator, but several are made at a time, by the calling thread.
    """
    if values.is_cpu and has_native():
        torch.ops.dlrm.draw_(values, seed, -bound, bound)
    else:
        plain_draw_uniform(values, bound, seed)


def plain_draw_uniform(values: torch.Tensor, bound: float, seed: int) -> None:
    """The twin of `draw_uniform`."""
    values.uniform_(-bound, bound, generator=torch.Generator(values.device).manual_seed(seed))
