"""The mean over ranks of gradients that DistributedDataParallel collects, in the shared memory of a host."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dlrm.kernels.exchange import exchanges_in_memory
from dlrm.kernels.gradient_memory import offer_memory
from dlrm.kernels.native import has_native


def replace_averages(model: nn.Module) -> None:
    """Has gradients added up where they lie, if their group exchanges in memory: all-reduces copy them otherwise."""
    if not has_native():
        return
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            group = module.process_group
            if group is not None and exchanges_in_memory(group):
                module.register_comm_hook(group, _average)


def _average(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    gradients = bucket.buffer()
    torch.ops.dlrm.share_storage_(group.boxed(), gradients)  # a new bucket's
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
        offer_memory(parameter, gradient)
    work: Any = dist.all_reduce(gradients, dist.ReduceOp.AVG, group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
