"""One optimizer over fused table updates and dense parameters."""

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from dlrm.config import OptimizerConfig


def fuse_table_optimizer(tables: nn.Module, config: OptimizerConfig) -> None:
    """Has each table updated inside the backward pass. Call before sharding: the planner counts the state."""
    kwargs = {"lr": config.learning_rate}
    if config.adagrad:
        kwargs["eps"] = config.eps
    apply_optimizer_in_backward(_optimizer_class(config), tables.parameters(), kwargs)


def table_state_floats_per_weight(config: OptimizerConfig) -> int:
    """Optimizer state of one element of a table."""
    return 1 if config.adagrad else 0


def build_optimizer(model: DistributedModelParallel, config: OptimizerConfig) -> CombinedOptimizer:
    """The tables' fused optimizer and one for everything else."""
    dense_parameters = dict(in_backward_optimizer_filter(model.named_parameters()))

    def build_dense(parameters: list[torch.Tensor | ShardedTensor]) -> torch.optim.Optimizer:
        if config.adagrad:
            return torch.optim.Adagrad(parameters, lr=config.learning_rate, eps=config.eps)
        return torch.optim.SGD(parameters, lr=config.learning_rate)

    return CombinedOptimizer([model.fused_optimizer, KeyedOptimizerWrapper(dense_parameters, build_dense)])


def _optimizer_class(config: OptimizerConfig) -> type[torch.optim.Optimizer]:
    return torch.optim.Adagrad if config.adagrad else torch.optim.SGD
