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
    """Averages gradients in place, in shared memory, if their group exchanges in memory.

    Otherwise DistributedDataParallel's all-reduce copies each bucket.
    """
    if not has_native():
        return
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            group = module.process_group
            if group is not None and exchanges_in_memory(group):
                module.register_comm_hook(_BucketMean(group, module.gradient_as_bucket_view), _BucketMean.average)


class _BucketMean:
    """DistributedDataParallel's hook, called with each bucket of gradients in each step."""

    def __init__(self, group: Any, offers_buckets: bool) -> None:
        self._group = group
        self._offers_buckets = offers_buckets
        self._addresses: dict[int, int] = {}  # of each bucket in the step before

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradients = bucket.buffer()
        torch.ops.dlrm.share_storage_(self._group.boxed(), gradients)  # does something for a new bucket only
        address = gradients.data_ptr()
        # DistributedDataParallel makes new buckets after its first steps. A bucket that is where it was stays there, so
        # the next step can write gradients straight into it.
        stays = self._offers_buckets and self._addresses.get(bucket.index()) == address
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            offer_memory(parameter, gradient if stays else None)
        self._addresses[bucket.index()] = address
        work: Any = dist.all_reduce(gradients, dist.ReduceOp.AVG, self._group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])
