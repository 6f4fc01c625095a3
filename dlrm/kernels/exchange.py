"""Collectives between the ranks of one host through shared memory, in place of gloo's sockets."""

import torch
import torch.distributed as dist

from dlrm.kernels.native import load_native


def exchange_in_memory(group: dist.ProcessGroup) -> str | None:
    """Lets a group's all-to-all, and its all-reduce of floats, go through shared memory instead of gloo.

    Collective. All ranks of the group must be on this host. The group's CPU backend must be gloo, which continues to do
    all other collectives. Calls after the first do nothing.

    Returns:
        None, or why the group stays as it was. All ranks return None, or none does.
    """
    if (why := load_native()) is not None:
        return why
    return torch.ops.dlrm.exchange_in_memory(group.boxed()) or None


def exchanges_in_memory(group: dist.ProcessGroup) -> bool:
    """Whether `exchange_in_memory` succeeded for this group. The operators must be loaded."""
    return torch.ops.dlrm.exchanges_in_memory(group.boxed())
