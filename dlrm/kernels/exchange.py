"""Collectives between the ranks of one host through shared memory, in place of gloo's sockets."""

import torch
import torch.distributed as dist

from dlrm.kernels.native import load_native


def exchange_in_memory(group: dist.ProcessGroup) -> str | None:
    """Has a group's all-to-all, and its all-reduce of floats, go through shared memory where they went through gloo.

    Collective. All ranks of the group are on this host, and the group's CPU backend is gloo, which goes on to do the
    rest. Calls after the first do nothing.

    Returns:
        None, or in words why the group stays as it was; the ranks agree.
    """
    if (why := load_native()) is not None:
        return why
    return torch.ops.dlrm.exchange_in_memory(group.boxed()) or None


def exchanges_in_memory(group: dist.ProcessGroup) -> bool:
    """Whether it does. The operators are loaded."""
    return torch.ops.dlrm.exchanges_in_memory(group.boxed())
