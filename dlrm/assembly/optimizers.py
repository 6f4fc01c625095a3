"""One optimizer over fused table updates, data-parallel tables and dense parameters."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dlrm.checkpoint.tensors import table_of
from dlrm.config.config import OptimizerConfig, OptimizerName
from dlrm.config.frozen import DENSE
from dlrm.config.table_rules import SHARDING_TYPES, TableConstraint
from dlrm.errors import PlanError
from dlrm.schema.criteo import TABLE_NAMES

_TABLE_CLASSES: dict[OptimizerName, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
    "adam": torch.optim.Adam,
}
_DENSE_CLASSES = {**_TABLE_CLASSES, "rowwise_adagrad": torch.optim.Adagrad, "adam": torch.optim.AdamW}


def fuse_table_optimizer(tables: EmbeddingBagCollection, config: OptimizerConfig, frozen: Collection[str] = ()) -> None:
    """Has each table updated inside the backward pass. Call before sharding: the planner counts the state.

    Frozen tables get an optimizer without state: TorchRec then keeps them in lookups of their own, which
    `freeze_lookups` leaves without an update.
    """
    options = _options(config, config.learning_rate)
    if config.weight_decay and config.algorithm == "rowwise_adagrad":
        options["weight_decay_mode"] = WeightDecayMode.L2  # without it the rate is not used; Adam's is decoupled
    for name, table in tables.embedding_bags.items():
        if name in frozen:
            apply_optimizer_in_backward(torch.optim.SGD, table.parameters(), {"lr": 0.0})
        else:
            apply_optimizer_in_backward(_TABLE_CLASSES[config.algorithm], table.parameters(), dict(options))


def allowed_sharding_types(
    config: OptimizerConfig, constraints: Mapping[str, TableConstraint], device: str, frozen: Collection[str] = ()
) -> list[str]:
    """The ways of sharding in which an update is the same whatever the plan. A rule may name others for its table.

    What an optimizer can't do is no matter of frozen tables.

    Row-wise Adagrad keeps one state for a row, or for each slice of it where columns are split. Adam's fused kernel
    and weight decay touch a batch's rows, a data-parallel table's optimizer all of them.

    Raises:
        PlanError: if a rule asks for what the optimizer can't do, or the optimizer for what the device can't.
    """
    trained = [name for name in TABLE_NAMES if name not in frozen]
    named = {name: rule.sharding_type for name, rule in constraints.items() if name in trained}
    excluded: tuple[str, ...] = ()
    if config.algorithm == "rowwise_adagrad":
        excluded = ("column_wise", "table_column_wise", "grid_shard")
        if split := [name for name, kind in named.items() if kind in excluded]:
            raise PlanError(
                f"--table_constraints: {named[split[0]]} of {split[0]} with --optimizer rowwise_adagrad. Each slice of "
                "a row would have a state of its own, and results depend on the plan. Use row_wise, or adagrad."
            )
    if device != "cuda" and any(named.get(name) != "data_parallel" for name in trained):
        remedy = (
            "Add --table_constraints 'all = data_parallel' (every rank holds every table, and updates all its rows), "
        )
        if config.algorithm == "adam":
            raise PlanError(
                f"--optimizer adam: FBGEMM has no fused Adam on a CPU. {remedy}or choose adagrad or rowwise_adagrad."
            )
        if config.weight_decay:
            raise PlanError(
                f"--weight_decay {config.weight_decay}: FBGEMM's kernels leave it out on a CPU. {remedy}or drop it."
            )
    if config.algorithm == "adam" or config.weight_decay:
        excluded += ("data_parallel",)
    return [kind for kind in SHARDING_TYPES if kind not in excluded]


class Optimizers(CombinedOptimizer):
    """All optimizers of a model as one, whose gradients are dropped rather than overwritten with zeros.

    A CUDA graph's backward writes gradients to the same memory each time; adding to them there would count them twice.
    So are gradients of frozen parameters, which no optimizer has.
    """

    def __init__(self, optimizers: Sequence[KeyedOptimizer], frozen: Sequence[nn.Parameter]) -> None:
        super().__init__(list(optimizers))
        self._frozen = frozen

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch.optim.Optimizer; TorchRec's own default is to write zeros."""
        super().zero_grad(set_to_none=set_to_none)
        for parameter in self._frozen:
            parameter.grad = None


def build_optimizer(
    model: DistributedModelParallel, config: OptimizerConfig, frozen: Collection[str] = ()
) -> CombinedOptimizer:
    """The tables' fused optimizer, one of the same kind for data-parallel tables, and one for everything else."""
    tables, dense, left = {}, {}, []
    for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
        table = table_of(name)
        if (table or DENSE) in frozen:
            left.append(parameter)
        else:
            (tables if table else dense)[name] = parameter
    parts = [
        (tables, _TABLE_CLASSES | {"adam": torch.optim.AdamW}, config.learning_rate),
        (dense, _DENSE_CLASSES, config.dense_rate),
    ]
    return Optimizers(
        [
            model.fused_optimizer,
            *(
                KeyedOptimizerWrapper(parameters, _builder(classes[config.algorithm], _options(config, rate)))
                for parameters, classes, rate in parts
                if parameters
            ),
        ],
        left,
    )


def _builder(
    optimizer: type[torch.optim.Optimizer], options: dict[str, Any]
) -> Callable[[list[torch.Tensor | ShardedTensor]], torch.optim.Optimizer]:
    def build(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        owned = list(parameters)
        return optimizer(owned, **options, **_kernel_options(optimizer, {parameter.device.type for parameter in owned}))

    return build


def _kernel_options(optimizer: type[torch.optim.Optimizer], devices: set[str]) -> dict[str, Any]:
    """One pass over each parameter. Adagrad on a GPU has no such kernel: it takes one pass for each operation."""
    if optimizer not in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW):
        return {}
    if optimizer is torch.optim.Adagrad and devices == {"cuda"}:
        return {"foreach": True}
    return {"fused": True} if devices <= {"cpu", "cuda"} else {}


def _options(config: OptimizerConfig, learning_rate: float) -> dict[str, Any]:
    options: dict[str, Any] = {"lr": learning_rate}
    if config.algorithm != "sgd":
        options["eps"] = config.eps
    if config.algorithm in ("rowwise_adagrad", "adam"):
        options["weight_decay"] = config.weight_decay
    return options
