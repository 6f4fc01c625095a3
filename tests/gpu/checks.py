"""What is checked on a GPU, as plain functions: pytest runs them, and benchmarks/gpu.py where there is no pytest.

Those that a CPU can do as well run there too, so that the checks themselves are checked. Run as a program, it prints a
line of JSON for each.

Shapes: B samples, F features, D embedding dimension, R rows of a table.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.assembly.build import build_model, make_sharder, plan_run
from dlrm.config.config import Config, DataConfig, ModelConfig, OptimizerConfig, ShardingConfig, TrainingConfig
from dlrm.kernels.interaction import dot_interaction
from dlrm.loader.run_data import hotness_of
from dlrm.ranks.runtime import start_runtime
from dlrm.schema.criteo import CATEGORICAL_NAMES
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.shard import shard_model
from dlrm.system.quiet import quieten_libraries
from dlrm.train.command import train
from tests.gpu.twins import BF16, INTERACTION_CASES, InteractionCase, dot_interaction_in_float64, relative_error

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROOT = Path(__file__).parent.parent.parent
KINDS = ("train", "val", "test")
SMALL = ModelConfig(num_embeddings=50, embedding_dim=16, dense_arch_layer_sizes=(32, 16), over_arch_layer_sizes=(32, 1))
FLAGS = [
    *("--embedding_dim", "16", "--dense_arch_layer_sizes", "32,16", "--over_arch_layer_sizes", "64,32,1"),
    *("--num_embeddings", "4000", "--batch_size", "256", "--limit_train_batches", "12", "--learning_rate", "0.05"),
    *("--seed", "3", "--log_every", "1", "--no_print_progress", "--validation_freq_within_epoch", "4"),
]


def check_interaction(case: InteractionCase, tolerance: float) -> None:
    """The Triton kernel against float64, forward and backward, on outputs that hold NaN before."""
    from dlrm.kernels.triton_interaction import triton_dot_interaction

    dense_BD, sources = case.draw(DEVICE)
    torch.full((1 << 22,), float("nan"), device=DEVICE)  # what the allocator gives next
    out_BP = triton_dot_interaction(dense_BD, sources, case.columns)
    if ON_GPU:  # where the model takes this kernel
        assert torch.equal(out_BP, dot_interaction(dense_BD, sources, case.columns))
    expected_BP = dot_interaction_in_float64(dense_BD, sources, case.columns)
    upstream_BP = torch.randn_like(out_BP)
    inputs = [dense_BD, *sources]
    got = [out_BP, *torch.autograd.grad(out_BP, inputs, upstream_BP)]
    expected = [expected_BP, *torch.autograd.grad(expected_BP, inputs, upstream_BP.double())]
    errors = [relative_error(ours, theirs) for ours, theirs in zip(got, expected, strict=True)]
    assert max(errors) < tolerance, f"relative errors {errors}, expected less than {tolerance}"


def interaction_in_every_case() -> None:
    """fp32 and bf16, all layouts."""
    for case in INTERACTION_CASES.values():
        is_bf16 = BF16 in (case.dense, *case.sources)
        check_interaction(case, 1e-2 if is_bf16 else 1e-6)


def interaction_of_mlperf_shape() -> None:
    """27 vectors of 128, a batch that no block size divides, in all precisions."""
    columns, width = tuple(range(0, 26 * 128, 128)), 26 * 128
    shape = InteractionCase(4099 if ON_GPU else 19, 128, (columns,), (width,))
    check_interaction(shape, 1e-6)
    check_interaction(replace(shape, dense=BF16, sources=(BF16,)), 1e-2)
    check_interaction(replace(shape, dense=BF16), 1e-2)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        check_interaction(shape, 2e-3)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def nccl_group_of_one_rank() -> None:
    """The process group is NCCL's and reduces."""
    with start_runtime() as runtime:
        assert dist.get_backend() == ("nccl" if ON_GPU else "gloo")
        one = torch.ones(3, device=runtime.device)
        dist.all_reduce(one)
        assert one.tolist() == [1.0] * 3


def tables_follow_the_dense_reference(optimizer: OptimizerConfig) -> None:
    """Ten steps of FBGEMM's lookup and fused update, against dense tables in float64."""
    config = Config(
        data=DataConfig(batch_size=64),
        model=SMALL,
        sharding=ShardingConfig(table_constraints="all = table_wise fused"),
        optimizer=optimizer,
        training=TrainingConfig(seed=1),
    )
    with start_runtime() as runtime:
        model = build_model(config, runtime)
        cluster = Cluster.detect(runtime, config.sharding)
        plan = plan_run(config, cluster, model, hotness_of(config))
        sharded = shard_model(model, plan, make_sharder(config), runtime.device, 1)
        collection = next(m for n, m in sharded.named_modules() if n.endswith("embedding_bag_collection"))
        reference = DenseTables(read_tables(sharded), optimizer)
        generator = torch.Generator().manual_seed(5)
        for _ in range(10):
            ids_FB = torch.randint(0, 50, (26, 64), generator=generator, dtype=torch.int32)
            ids_FB[:, :20] = ids_FB[:, :1]  # many times the same row
            upstream_BG = torch.randn(64, 26 * 16, generator=generator)
            lengths = torch.ones(26 * 64, dtype=torch.int32)
            features = KeyedJaggedTensor(list(CATEGORICAL_NAMES), ids_FB.flatten(), lengths=lengths).to(runtime.device)
            pooled = collection(features).to_dict()
            pooled_BG = torch.cat([pooled[name] for name in CATEGORICAL_NAMES], dim=1)
            assert relative_error(pooled_BG.cpu(), reference.look_up(ids_FB)) < 1e-5
            (pooled_BG * upstream_BG.to(runtime.device)).sum().backward()
            reference.update(ids_FB, upstream_BG)
        for name, table_RD in read_tables(sharded).items():
            error = relative_error(table_RD, reference.tables[name])
            assert error < 1e-5, f"{name}: relative error {error}"


def read_tables(sharded: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of every table, by name."""
    tables = {}
    for name, weight in sharded.state_dict().items():
        if ".embedding_bags." in name:
            local = weight.local_shards()[0].tensor if hasattr(weight, "local_shards") else weight
            tables[name.split(".embedding_bags.")[1].split(".")[0]] = local.detach().cpu().double()
    return tables


class DenseTables:
    """Tables and optimizers in float64, updated row by row as the kernels promise: rows of a batch, once each."""

    def __init__(self, tables: dict[str, Tensor], optimizer: OptimizerConfig) -> None:
        self.tables = {f"t_{name}": tables[f"t_{name}"].clone() for name in CATEGORICAL_NAMES}
        self.optimizer = optimizer
        self.first = {name: torch.zeros_like(table) for name, table in self.tables.items()}
        self.second = {name: torch.zeros_like(table) for name, table in self.tables.items()}
        self.step = 0

    def look_up(self, ids_FB: Tensor) -> Tensor:
        """Rows of all features side by side."""
        return torch.cat([table[ids.long()] for table, ids in zip(self.tables.values(), ids_FB, strict=True)], dim=1)

    def update(self, ids_FB: Tensor, upstream_BG: Tensor) -> None:
        """A step."""
        self.step += 1
        for name, ids, grad_BD in zip(self.tables, ids_FB.long(), upstream_BG.double().split(16, dim=1), strict=True):
            grad_RD = torch.zeros_like(self.tables[name]).index_add_(0, ids, grad_BD)
            rows = ids.unique()
            self.tables[name][rows] -= self._change(name, rows, grad_RD[rows])

    def _change(self, name: str, rows: Tensor, grad: Tensor) -> Tensor:
        own, weights = self.optimizer, self.tables[name][rows]
        rate, eps, decay = own.learning_rate, own.eps, own.weight_decay
        match own.algorithm:
            case "adagrad":
                self.second[name][rows] += grad**2
                return rate * grad / (self.second[name][rows].sqrt() + eps)
            case "rowwise_adagrad":
                grad = grad + decay * weights
                self.second[name][rows] += (grad**2).mean(dim=1, keepdim=True)
                return rate * grad / (self.second[name][rows].sqrt() + eps)
            case "adam":
                self.first[name][rows] = 0.9 * self.first[name][rows] + 0.1 * grad
                self.second[name][rows] = 0.999 * self.second[name][rows] + 0.001 * grad**2
                first = self.first[name][rows] / (1 - 0.9**self.step)
                second = self.second[name][rows] / (1 - 0.999**self.step)
                return rate * (first / (second.sqrt() + eps) + decay * weights)
        return rate * grad


@lru_cache(maxsize=8)
def run_losses(*flags: str) -> list[float]:
    """Losses and AUROCs of a run in this process."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        train([*FLAGS, "--run_dir", str(run_dir), *flags])
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] if line["kind"] == "train" else line["auroc"] for line in lines if line["kind"] in KINDS]


def assert_close(got: list[float], expected: list[float], tolerance: float) -> None:
    """Each figure of two runs."""
    assert len(got) == len(expected) > 12
    worst = max(abs(one - other) for one, other in zip(got, expected, strict=True))
    assert worst < tolerance, f"losses or AUROCs differ by {worst}, expected less than {tolerance}"


def pipelines_agree() -> None:
    """base and sparse_dist give the same losses."""
    assert_close(run_losses("--pipeline", "base"), run_losses(), 1e-5)


def prefetch_trains_and_evaluates() -> None:
    """Tables in host memory under the prefetch pipeline, with evaluations between: as tables on the GPU."""
    cached = ["--table_constraints", "all = table_wise fused_uvm_caching cache=0.3"]
    expected = run_losses("--table_constraints", "all = table_wise fused")
    assert_close(run_losses(*cached), expected, 1e-4)
    assert_close(run_losses(*cached, "--pipeline", "prefetch"), expected, 1e-4)


def precisions_agree() -> None:
    """bf16 and tf32 stay near fp32."""
    expected = run_losses()
    assert_close(run_losses("--precision", "bf16"), expected, 0.02)
    if ON_GPU:
        assert_close(run_losses("--precision", "tf32"), expected, 0.005)


def every_dense_optimizer() -> None:
    """Fused ones, and Adagrad in one kernel an operation, train."""
    for optimizer in ("sgd", "adagrad", "rowwise_adagrad", *(("adam",) if ON_GPU else ())):
        losses = run_losses("--optimizer", optimizer, "--learning_rate", "0.01")
        assert all(loss < 2 for loss in losses), losses


def compiled_parts_agree() -> None:
    """--dense_execution compile, and cuda_graph on a GPU."""
    expected = run_losses()
    for execution in ("compile", *(("cuda_graph",) if ON_GPU else ())):
        assert_close(run_losses("--dense_execution", execution), expected, 1e-4)


def entry_point() -> None:
    """dlrm_main.py in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "dlrm_main.py"), *FLAGS, "--run_dir", str(Path(folder, "run"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ.copy())
        assert done.returncode == 0, done.stderr[-2000:]
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    assert summary["num_train_samples"] == 12 * 256
    assert (summary["device"] == "cpu") != ON_GPU


def _tables(**optimizer: Any) -> Callable[[], None]:
    return lambda: tables_follow_the_dense_reference(OptimizerConfig(learning_rate=0.1, **optimizer))


CHECKS: dict[str, Callable[[], None]] = {
    "interaction_in_every_case": interaction_in_every_case,
    "interaction_of_mlperf_shape": interaction_of_mlperf_shape,
    "nccl_group_of_one_rank": nccl_group_of_one_rank,
    "tables_sgd": _tables(),
    "tables_adagrad": _tables(optimizer="adagrad"),
    "tables_rowwise_adagrad": _tables(optimizer="rowwise_adagrad"),
    "tables_rowwise_adagrad_weight_decay": _tables(optimizer="rowwise_adagrad", weight_decay=0.05),
    "tables_adam": _tables(optimizer="adam"),
    "tables_adam_weight_decay": _tables(optimizer="adam", weight_decay=0.05),
    "entry_point": entry_point,
    "pipelines_agree": pipelines_agree,
    "prefetch_trains_and_evaluates": prefetch_trains_and_evaluates,
    "precisions_agree": precisions_agree,
    "every_dense_optimizer": every_dense_optimizer,
    "compiled_parts_agree": compiled_parts_agree,
}
GPU_ONLY = {
    *("interaction_in_every_case", "interaction_of_mlperf_shape", "tables_rowwise_adagrad_weight_decay"),
    *("tables_adam", "tables_adam_weight_decay", "prefetch_trains_and_evaluates"),
}
"""Triton, FBGEMM's Adam and weight decay, and tables that a GPU caches."""


def main() -> None:
    """Runs the checks that are named, or all that this machine can do."""
    quieten_libraries()
    for name in sys.argv[1:] or [name for name in CHECKS if ON_GPU or name not in GPU_ONLY]:
        started, error = time.perf_counter(), ""
        try:
            CHECKS[name]()
        except Exception:  # noqa: BLE001 - the next check may tell more
            error = traceback.format_exc(limit=-6)
        seconds = round(time.perf_counter() - started, 2)
        print(
            f"CHECK {json.dumps({'check': name, 'passed': not error, 'seconds': seconds, 'error': error})}", flush=True
        )


if __name__ == "__main__":
    main()
