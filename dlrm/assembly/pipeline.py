"""The pipeline that a step goes through: batches ahead, input all-to-all ahead, forward, backward, update."""

from collections.abc import Iterator
from typing import Literal, cast

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipeline
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.errors import ConfigError
from dlrm.loader.batch import Batch
from dlrm.model.dlrm import Output
from dlrm.sharding.placement import Placement

PipelineName = Literal["base", "sparse_dist", "prefetch"]

_CACHED_KERNEL = EmbeddingComputeKernel.FUSED_UVM_CACHING.value


def check_pipeline(name: PipelineName, placement: Placement, device: torch.device) -> None:
    """Refuses a pipeline that has nothing to do for these tables on this device.

    Raises:
        ConfigError: for `prefetch` without a CUDA device, or without a table that a GPU caches.
    """
    if name != "prefetch":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"--pipeline prefetch: expected a CUDA device, got {device.type}; it fills the GPU's cache of tables in "
            "host memory. Use --pipeline sparse_dist."
        )
    kernels = sorted({table.kernel for table in placement.tables})
    if _CACHED_KERNEL not in kernels:
        raise ConfigError(
            f"--pipeline prefetch: expected a table with the kernel {_CACHED_KERNEL}, and the plan has "
            f"{', '.join(kernels)}. Use --pipeline sparse_dist."
        )


def build_pipeline(
    name: PipelineName, model: DistributedModelParallel, optimizer: CombinedOptimizer, device: torch.device
) -> TrainPipeline[Batch, Output]:
    """TorchRec's pipeline of that name. It also evaluates: with `model.eval()` a step is forward alone.

    Call `reset` before each pass over another iterator.
    """
    kinds = {"base": TrainPipelineBase, "sparse_dist": TrainPipelineSparseDist, "prefetch": _PrefetchPipeline}
    return kinds[name](model, cast(torch.optim.Optimizer, optimizer), device)


class _PrefetchPipeline(PrefetchTrainPipelineSparseDist[Batch, Output]):
    """FBGEMM locks the cache lines of each forward and unlocks them in backward: evaluation would leave them locked."""

    def reset(self) -> None:
        """Call when no batch is in the pipeline."""
        super().reset()
        for kernel in table_kernels(self._model):
            if (counter := getattr(kernel, "lxu_cache_locking_counter", None)) is not None:
                counter.zero_()


def table_kernels(model: nn.Module) -> Iterator[nn.Module]:
    """FBGEMM's modules in a sharded model, which `modules()` does not reach: TorchRec keeps them in a plain list."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):
            yield from (part for part in lookup.modules() if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen))
