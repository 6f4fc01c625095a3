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
                module.register_comm_hook(_Averages(group, module.gradient_as_bucket_view), _Averages.average)


class _Averages:
    def __init__(self, group: Any, offers_buckets: bool) -> None:
        self._group = group
        self._offers_buckets = offers_buckets
        self._places: dict[int, int] = {}  # of buckets in memory, which are made anew after the first steps

    def average(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        gradients = bucket.buffer()
        torch.ops.dlrm.share_storage_(self._group.boxed(), gradients)  # a new bucket's
        place = gradients.data_ptr()
        stays = self._offers_buckets and self._places.get(bucket.index()) == place
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            offer_memory(parameter, gradient if stays else None)
        self._places[bucket.index()] = place
        work: Any = dist.all_reduce(gradients, dist.ReduceOp.AVG, self._group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])
