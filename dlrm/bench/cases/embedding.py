"""`dlrm bench embedding`: rows looked up, and updated from the gradients of their sums.

Shapes: B samples, T columns of all features' pooled rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from dlrm.bench.cases.train import BYTES, count_distinct_rows, show_rate
from dlrm.bench.harness.ceilings import ceilings_side
from dlrm.bench.harness.flags import EmbeddingBench, Shape
from dlrm.bench.harness.floor import Floor
from dlrm.bench.harness.provenance import write_result
from dlrm.bench.harness.repeat import repeat, require_kernels
from dlrm.bench.harness.report import Speed, compare, describe_spread, print_floor, print_speeds
from dlrm.bench.harness.rounds import best_ceilings, fits_at_once, take_turns
from dlrm.bench.harness.shape import NUM_CACHED_BATCHES, make_config, memory_gib
from dlrm.bench.harness.workers import Side, Turns
from dlrm.config.config import Config
from dlrm.cost.least_work import least_embedding_work
from dlrm.cost.work import ID, Work
from dlrm.loader.batch import build_batch
from dlrm.loader.partition import Partition
from dlrm.loader.random_rows import RandomRows
from dlrm.schema.criteo import NUM_CATEGORICAL_FEATURES, ONE_HOT
from dlrm.sharding.host.lookups import HostTables, Lookup

_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(bench: EmbeddingBench) -> dict[str, Any]:
    """Measures, prints, writes; returns the result.

    Raises:
        DlrmError: what a side raised.
    """
    workload = bench.workload
    config = make_config(Shape(**asdict(workload), ranks=1, precision=bench.arithmetic), NUM_CACHED_BATCHES)
    sides = [
        Side("ours", open_kernel, (config, bench), ("update",)),
        Side("reference", open_fbgemm, (config, bench), ("update",), is_plain=True),
    ]
    at_once = fits_at_once(sides, memory_gib(config, workload.optimizer), workload.batch_size)
    results = take_turns(
        [*sides, ceilings_side("fp32")], bench.repetition.rounds, show_rate(workload.batch_size), at_once=at_once
    )
    speeds = {side.name: Speed(workload.batch_size, results[side.name].turns["update"]) for side in sides}
    floor = Floor(count_update(config, bench), best_ceilings(results))
    result: dict[str, Any] = {
        "case": "embedding",
        **compare(speeds["ours"], speeds["reference"], floor),
        "sides": {name: {**results[name].to_json(), **speed.to_json()} for name, speed in speeds.items()},
        "bench": asdict(bench),
        "precision": bench.arithmetic,
        "at_once": at_once,
    }
    print_speeds(speeds)
    print(f"ratio by round: {describe_spread(result['ratios'])}")
    print_floor(floor, speeds["ours"], "a call")
    write_result(bench.repetition.json, result)
    return result


def count_update(config: Config, bench: EmbeddingBench) -> Work:
    """Rows and their state; each sample's ids read, pooled rows written, their gradients read."""
    workload = bench.workload
    rows = count_distinct_rows(config, workload.batch_size)
    dim = config.model.embedding_dim
    pooled = 2 * dim * BYTES[bench.arithmetic]
    per_sample = NUM_CATEGORICAL_FEATURES * (ID + pooled)
    return least_embedding_work(dim, workload.optimizer, rows) + Work(0, workload.batch_size * per_sample)


@contextmanager
def open_kernel(config: Config, bench: EmbeddingBench) -> Iterator[Turns]:
    """Our operators on FBGEMM's tables; pooled rows and gradients in our side's precision."""
    require_kernels()
    module = make_tables(config)
    tables = HostTables.of(module)
    assert tables is not None, "FBGEMM's tables, of a kind that the operators take"
    batches = draw_batches(config)
    dtype = _DTYPES[bench.arithmetic]
    grad_BT = draw_gradient(config).to(dtype)

    def update(number: int) -> None:
        ids, offsets = batches[number % len(batches)]
        pooled_BT = Lookup.apply(
            module.placeholder_autograd_tensor, tables, ids, offsets, module.learning_rate_tensor, dtype, 1.0
        )
        pooled_BT.backward(grad_BT)

    yield {"update": repeat(update, bench.steps)}


@contextmanager
def open_fbgemm(config: Config, bench: EmbeddingBench) -> Iterator[Turns]:
    """FBGEMM's own lookup and fused backward, in fp32, on 64-bit ids as torchrec's random data set has them."""
    module = make_tables(config)
    batches = [(ids.long(), offsets.long()) for ids, offsets in draw_batches(config)]
    grad_BT = draw_gradient(config)

    def update(number: int) -> None:
        module(*batches[number % len(batches)]).backward(grad_BT)

    yield {"update": repeat(update, bench.steps)}


def make_tables(config: Config) -> SplitTableBatchedEmbeddingBagsCodegen:
    """FBGEMM's module as TorchRec makes it on a CPU."""
    dim = config.model.embedding_dim
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in config.model.table_rows],
        optimizer=_OPTIMIZERS[config.optimizer.algorithm],
        learning_rate=config.optimizer.learning_rate,
        eps=config.optimizer.eps,
        device=torch.device("cpu"),
    )
    for weights in module.split_embedding_weights():
        weights.uniform_(-0.01, 0.01)
    return module


def draw_batches(config: Config) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids of ten batches, feature by feature, and where each bag begins and ends."""
    source = RandomRows(config.model.table_rows, ONE_HOT, config.data.zipf_exponent, seed=0)
    partition = Partition(NUM_CACHED_BATCHES * config.data.batch_size, config.data.batch_size, 1)
    batches = (
        build_batch(source.read(span.start, span.stop), span, ONE_HOT).sparse_features for span in partition.spans(0)
    )
    return [(features.values(), features.offsets()) for features in batches]


def draw_gradient(config: Config) -> torch.Tensor:
    """Of the pooled rows, small enough that thousands of steps leave the weights finite."""
    columns = NUM_CATEGORICAL_FEATURES * config.model.embedding_dim
    return torch.rand(config.data.batch_size, columns) * 1e-3
