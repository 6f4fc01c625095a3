"""The other side: TorchRec's own model, planner, kernels and pipeline in fp32, put together as its documentation does.

Shapes: B samples of this rank.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torchmetrics
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.random import RandomRecDataset
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from dlrm.bench.harness.our_side import StepClock, describe
from dlrm.bench.harness.shape import NUM_CACHED_BATCHES
from dlrm.bench.harness.workers import Turns
from dlrm.config.config import Config, ModelConfig, OptimizerConfig
from dlrm.loader.run_data import RunData, build_splits
from dlrm.ranks.runtime import Runtime
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_INTEGER_FEATURES, TABLE_NAMES

_TABLE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rowwise_adagrad": RowWiseAdagrad,
}
_DENSE_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    **_TABLE_OPTIMIZERS,
    "rowwise_adagrad": torch.optim.Adagrad,
}


@contextmanager
def open_reference(config: Config) -> Iterator[Turns]:
    """The same turns as `dlrm.bench.harness.our_side.open_ours`, of a plain TorchRec loop."""
    device = torch.device("cpu")
    sharded = shard_reference(build_reference(config.model, device), config, device)
    pipeline = build_pipeline(sharded, config.optimizer, device)
    batches = draw_batches(config)
    steps = config.data.limit_train_batches
    assert steps is not None

    def train() -> list[float]:
        sharded.train()
        own = itertools.islice(batches, steps)
        for _ in range(steps):
            pipeline.progress(own)
        return pipeline.seconds()

    def evaluate() -> list[float]:
        started = time.perf_counter()
        score(sharded, pipeline, itertools.islice(batches, steps))
        pipeline.seconds()
        return [time.perf_counter() - started]

    yield {"train": train, "evaluate": evaluate, "describe": lambda: describe(sharded, config.optimizer)}


def build_reference(shape: ModelConfig, device: torch.device) -> nn.Module:
    """torchrec.models.dlrm with its loss."""
    tables = [
        EmbeddingBagConfig(name=table, embedding_dim=shape.embedding_dim, num_embeddings=rows, feature_names=[feature])
        for table, feature, rows in zip(TABLE_NAMES, CATEGORICAL_NAMES, shape.table_rows, strict=True)
    ]
    return torchrec_dlrm.DLRMTrain(
        torchrec_dlrm.DLRM(
            EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
            NUM_INTEGER_FEATURES,
            list(shape.dense_arch_layer_sizes),
            list(shape.over_arch_layer_sizes),
            dense_device=device,
        )
    )


def shard_reference(model: nn.Module, config: Config, device: torch.device) -> DistributedModelParallel:
    """With the tables' optimizer fused, where TorchRec's planner puts them. Collective."""
    tables = model.get_submodule("model.sparse_arch").parameters()
    optimizer = config.optimizer
    apply_optimizer_in_backward(_TABLE_OPTIMIZERS[optimizer.algorithm], tables, _options(optimizer))
    world_size = dist.get_world_size()
    topology = Topology(world_size=world_size, local_world_size=world_size, compute_device=device.type)
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=config.data.batch_size)
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)


def build_pipeline(
    sharded: DistributedModelParallel, config: OptimizerConfig, device: torch.device
) -> StepClock[Batch, Any]:
    """TorchRec's sparse-dist pipeline."""
    optimizer: Any = build_optimizer(sharded, config)
    return StepClock(TrainPipelineSparseDist(sharded, optimizer, device, execute_all_batches=True))


def build_optimizer(sharded: DistributedModelParallel, config: OptimizerConfig) -> CombinedOptimizer:
    """The tables' optimizer and one of the dense parts."""
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: _DENSE_OPTIMIZERS[config.algorithm](parameters, **_options(config)),
    )
    return CombinedOptimizer([sharded.fused_optimizer, dense])


def _options(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.learning_rate, **({} if config.algorithm == "sgd" else {"eps": config.eps})}


def draw_batches(config: Config) -> Iterator[Batch]:
    """Ten batches over and over: torchrec's random ones, or ours where ids are to follow a power law."""
    if config.data.zipf_exponent:
        return itertools.cycle(_power_law_batches(config))
    return iter(
        RandomRecDataset(
            keys=list(CATEGORICAL_NAMES),
            batch_size=config.data.batch_size,
            hash_sizes=list(config.model.table_rows),
            ids_per_feature=1,
            num_dense=NUM_INTEGER_FEATURES,
            num_generated_batches=NUM_CACHED_BATCHES,
        )
    )


def _power_law_batches(config: Config) -> list[Batch]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    runtime = Runtime(rank, rank, world_size, world_size, torch.device("cpu"))
    split = build_splits(RunData.open(config), runtime)["train"]
    return [
        Batch(dense_features=batch.dense_BI, sparse_features=batch.sparse_features, labels=batch.labels_B.int())
        for batch in itertools.islice(split.batches(), NUM_CACHED_BATCHES)
    ]


def score(model: nn.Module, pipeline: StepClock[Batch, Any], batches: Iterator[Batch]) -> float:
    """AUROC by torchmetrics, which keeps every score, over what `batches` still holds."""
    model.eval()
    auroc = torchmetrics.AUROC(task="binary")
    with torch.no_grad():
        while True:
            try:
                _, logits_B, labels_B = pipeline.progress(batches)
            except StopIteration:
                return auroc.compute().item()
            auroc(logits_B.sigmoid(), labels_B)
