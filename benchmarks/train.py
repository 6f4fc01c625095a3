"""Samples per second of this trainer against a plain TorchRec loop, in turn, in the same processes.

    python -m benchmarks.train --ranks 2 --json benchmarks/results/train_vs_torchrec_cpu.json

The reference is torchrec.models.dlrm in fp32 with TorchRec's planner, fused SGD, its sparse-dist pipeline, and its
random data set of ten cached batches, as the public example puts them together. The shape is that of the example's
results table with 100,000 rows a table. Ours generates fresh batches.
"""

import argparse
import itertools
import statistics
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.datasets.random import RandomRecDataset
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.models import dlrm as torchrec_dlrm
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from benchmarks.provenance import write_result
from dlrm.config import Config, DataConfig, EvaluationConfig, ModelConfig, OptimizerConfig, OutputConfig, TrainingConfig
from dlrm.data.splits import open_run_splits
from dlrm.runtime import Runtime, start_runtime
from dlrm.schema import CATEGORICAL_NAMES, NUM_INTEGER_FEATURES, TABLE_NAMES
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.shard import shard_model
from dlrm.train.build import build_model, make_sharder, plan_run
from dlrm.train.main import quieten_libraries
from dlrm.train.optimizers import build_optimizer
from dlrm.train.trainer import Trainer

WARM_UP_STEPS = 5
LEARNING_RATE = 0.1


class StepTimes:
    """A sink that keeps seconds per step."""

    def __init__(self, global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self.seconds: list[float] = []

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Every step reports, so its rate is that of one step."""
        if line["kind"] == "train":
            self.seconds.append(self.global_batch_size / line["samples_per_second"])


def make_config(batch_size: int, steps: int, num_embeddings: int) -> Config:
    """The shape of the public example's results table."""
    return Config(
        data=DataConfig(batch_size=batch_size, limit_train_batches=steps),
        model=ModelConfig(
            num_embeddings=num_embeddings,
            embedding_dim=128,
            dense_arch_layer_sizes=(512, 256, 128),
            over_arch_layer_sizes=(1024, 1024, 512, 256, 1),
        ),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        training=TrainingConfig(seed=0),
        evaluation=EvaluationConfig(evaluate_on_epoch_end=False, evaluate_on_training_end=False),
        output=OutputConfig(log_every=1, print_progress=False),
    )


def build_ours(config: Config, runtime: Runtime) -> Callable[[], list[float]]:
    """A function that trains one epoch and gives the seconds of each step."""
    model = build_model(config, runtime)
    plan = plan_run(config, Cluster.detect(runtime, config.sharding), model)
    sharded = shard_model(model, plan, make_sharder(config), runtime.device, 0)
    sink = StepTimes(config.data.batch_size * runtime.world_size)
    splits = open_run_splits(config, runtime)
    trainer = Trainer(config, runtime, splits, sharded, build_optimizer(sharded, config.optimizer), sink)

    def train_epoch() -> list[float]:
        sink.seconds.clear()
        trainer.train()
        return list(sink.seconds)

    return train_epoch


def build_reference(config: Config, runtime: Runtime) -> Callable[[], list[float]]:
    """The same of a plain TorchRec loop."""
    shape = config.model
    tables = [
        EmbeddingBagConfig(
            name=table, embedding_dim=shape.embedding_dim, num_embeddings=shape.num_embeddings, feature_names=[feature]
        )
        for table, feature in zip(TABLE_NAMES, CATEGORICAL_NAMES, strict=True)
    ]
    model = torchrec_dlrm.DLRMTrain(
        torchrec_dlrm.DLRM(
            EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
            NUM_INTEGER_FEATURES,
            list(shape.dense_arch_layer_sizes),
            list(shape.over_arch_layer_sizes),
            dense_device=runtime.device,
        )
    )
    apply_optimizer_in_backward(torch.optim.SGD, model.model.sparse_arch.parameters(), {"lr": LEARNING_RATE})
    topology = Topology(
        world_size=runtime.world_size, local_world_size=runtime.local_world_size, compute_device=runtime.device.type
    )
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=config.data.batch_size)
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=runtime.device, plan=plan, sharders=sharders)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
    )
    pipeline = TrainPipelineSparseDist(
        sharded, CombinedOptimizer([sharded.fused_optimizer, dense]), runtime.device, execute_all_batches=True
    )
    steps = config.data.limit_train_batches or 0
    data = RandomRecDataset(
        keys=list(CATEGORICAL_NAMES),
        batch_size=config.data.batch_size,
        hash_size=shape.num_embeddings,
        ids_per_feature=1,
        num_dense=NUM_INTEGER_FEATURES,
        num_generated_batches=10,
    )
    batches: Iterator[Any] = iter(data)

    def train_epoch() -> list[float]:
        sharded.train()
        own = itertools.islice(batches, steps)
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            pipeline.progress(own)
            seconds.append(time.perf_counter() - started)
        return seconds

    return train_epoch


def compare(batch_size: int, steps: int, num_embeddings: int, rounds: int) -> dict[str, Any]:
    """Runs in a worker: the sides in turn; the seconds of each step after the warm-up, by side and round."""
    warnings.simplefilter("ignore")
    quieten_libraries()
    config = make_config(batch_size, WARM_UP_STEPS + steps, num_embeddings)
    with start_runtime() as runtime:
        sides = {"ours": build_ours(config, runtime), "reference": build_reference(config, runtime)}
        times: dict[str, list[list[float]]] = {name: [] for name in sides}
        for number in range(rounds):
            for name, train_epoch in sides.items():
                times[name].append(train_epoch()[WARM_UP_STEPS:])
                rate = steps * batch_size * runtime.world_size / sum(times[name][-1])
                if runtime.is_main:
                    print(f"round {number + 1}/{rounds}  {name:<9}  {rate:>9,.0f} samples/s", flush=True)
        return {"config": asdict(config), "threads_per_rank": torch.get_num_threads(), "step_seconds": times}


def main() -> None:
    """Runs the comparison and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2048, help="samples per rank (default: %(default)s)")
    parser.add_argument("--num_embeddings", type=int, default=100_000, help="rows a table (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=arguments.ranks,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(folder, "rdzv")),
            rdzv_configs={"store_type": "file"},
        )
        result = elastic_launch(launch, compare)(
            arguments.batch_size, arguments.steps, arguments.num_embeddings, arguments.rounds
        )[0]
    samples = arguments.batch_size * arguments.ranks
    rates = {
        name: [samples * len(seconds) / sum(seconds) for seconds in rounds]
        for name, rounds in result["step_seconds"].items()
    }
    ratios = [ours / reference for ours, reference in zip(rates["ours"], rates["reference"], strict=True)]
    ratio = statistics.median(ratios)
    print("side       samples/s: median      min      max")
    for name, values in rates.items():
        print(f"{name:<9}  {statistics.median(values):>17,.0f}  {min(values):>7,.0f}  {max(values):>7,.0f}")
    print(f"ratio by round: median {ratio:.2f}, min {min(ratios):.2f}, max {max(ratios):.2f}")
    if arguments.json:
        summary = {"ratio": ratio, "ratios": ratios, "ranks": arguments.ranks, "samples_per_second": rates}
        write_result(arguments.json, {**summary, **result})


if __name__ == "__main__":
    main()
