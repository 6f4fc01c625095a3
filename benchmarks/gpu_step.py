"""One case of benchmarks/gpu.py in a process of its own: MLPerf v1's model, trained for some steps.

Prints a line of JSON that begins with RESULT.
"""

import gzip
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_kernels import Clock
from dlrm.assembly.foundation import lay_foundation
from dlrm.config.config import (
    PROFILE_WARM_UP_STEPS,
    Config,
    DataConfig,
    DenseExecution,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    Precision,
    ShardingConfig,
    TrainingConfig,
)
from dlrm.config.recipes import MLPERF_ROWS
from dlrm.cost.least_work import least_training_work
from dlrm.cost.optimizer_state import state_floats
from dlrm.loader.batch import Batch
from dlrm.loader.run_data import RunData, build_splits
from dlrm.metrics.training import TrainingMeter
from dlrm.ranks.runtime import Runtime, peak_memory_gib, start_runtime
from dlrm.system.quiet import quieten_libraries
from dlrm.train.profiling import StepProfiler
from dlrm.train.schedule import LearningRateSchedule

DIM = 128
BATCHES = 6
WARM_UP_STEPS = 8
TRACED_STEPS = 3
EXPONENTS = {"uniform": 0.0, "power_law": 1.05}
RESERVED_GIB = 8.0
"""For activations, gradients and the lookup's own buffers."""


@dataclass(frozen=True)
class Case:
    """What is trained. `cap_gib` is for tables and their optimizer state; None takes what the device has."""

    name: str
    precision: Precision = "bf16"
    execution: DenseExecution = "eager"
    optimizer: OptimizerName = "sgd"
    batch_size: int = 65_536
    steps: int = 40
    cap_gib: float | None = None
    trace: str | None = None


def fit_rows(rows: tuple[int, ...], bytes_per_row: float, available: float) -> tuple[int, ...]:
    """The same tables, the largest of them cut to as many rows as make all fit."""
    low, high = 1, max(rows)
    while low < high:
        cap = (low + high + 1) // 2
        fits = sum(min(cap, own) for own in rows) * bytes_per_row <= available
        low, high = (cap, high) if fits else (low, cap - 1)
    return tuple(min(low, own) for own in rows)


def make_config(case: Case, device: torch.device) -> Config:
    """MLPerf v1's shape with tables as large as fit."""
    optimizer = OptimizerConfig(optimizer=case.optimizer, learning_rate=0.01)
    bytes_per_row = 4 * (DIM + state_floats(case.optimizer, DIM))
    reserved = ShardingConfig.reserved_memory_share
    if case.cap_gib is not None:
        available = case.cap_gib * 2**30
    else:
        assert device.type == "cuda", "a CPU has no memory of its own to fill: give cap_gib"
        free, total = torch.cuda.mem_get_info(device)
        available = min(free - RESERVED_GIB * 2**30, total * (1 - reserved) - RESERVED_GIB / 2 * 2**30)
    return Config(
        data=DataConfig(batch_size=case.batch_size, num_generated_batches=BATCHES, limit_train_batches=1 << 30),
        model=ModelConfig(
            num_embeddings_per_feature=fit_rows(MLPERF_ROWS, bytes_per_row, available),
            embedding_dim=DIM,
            dense_arch_layer_sizes=(512, 256, DIM),
            over_arch_layer_sizes=(1024, 1024, 512, 256, 1),
        ),
        sharding=ShardingConfig(table_constraints="all = table_wise fused"),
        optimizer=optimizer,
        training=TrainingConfig(seed=0, precision=case.precision, dense_execution=case.execution),
    )


class Loop:
    """The trainer's step: rate, pipeline, meter; nothing of it waits for the device."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        foundation = lay_foundation(config, runtime, ("train",), is_quiet=True)
        self.model, self.pipeline = foundation.model, foundation.pipeline
        self.schedule = LearningRateSchedule(foundation.optimizer, config.optimizer)
        self.meter = TrainingMeter(1 << 12, runtime.device, runtime.world_size)
        self.step = 0

    def advance(self, batches: Iterator[Batch]) -> None:
        """A step."""
        self.step += 1
        self.schedule.begin_step(self.step)
        self.meter.update(self.step, self.pipeline.progress(batches).loss, 1)


def take_batches(config: Config, runtime: Runtime) -> list[Batch]:
    """Some batches, built before anything is timed."""
    return list(islice(build_splits(RunData.open(config), runtime)["train"].batches(), BATCHES))


def measure_ids(loop: Loop, config: Config, case: Case, runtime: Runtime, exponent: float) -> dict[str, Any]:
    """Steps on ids of one distribution: milliseconds of each, and what it takes to judge them."""
    data = replace(config.data, zipf_exponent=exponent)
    own = take_batches(replace(config, data=data), runtime)
    distinct = [
        sum(len(np.unique(part)) for part in batch.sparse_features.values().view(26, -1).cpu()) for batch in own
    ]
    batches = chain.from_iterable(repeat(own))
    loop.pipeline.reset()
    first = Clock(runtime.device)
    loop.advance(batches)
    first_step_ms = first.stop()
    for _ in range(WARM_UP_STEPS):
        loop.advance(batches)
    clock = Clock(runtime.device)
    for _ in range(case.steps):
        loop.advance(batches)
        clock.lap()
    total_ms = clock.stop()
    laps = clock.laps()
    width = 2 if case.precision == "bf16" else 4
    work = least_training_work(config.model, case.optimizer, case.batch_size, round(statistics.mean(distinct)), width)
    return {
        "samples_per_second": 1000 * case.steps * case.batch_size / total_ms,
        "step_ms": laps,
        "median_step_ms": statistics.median(laps),
        "first_step_ms": first_step_ms,
        "distinct_rows": statistics.mean(distinct),
        "work": {"flop": work.flop, "num_bytes": work.num_bytes},
        "host_syncs": find_host_syncs(loop, batches, runtime),
        "copy_batch_ms": time_copy(own[0], runtime.device),
    }


def find_host_syncs(loop: Loop, batches: Iterator[Batch], runtime: Runtime) -> list[str]:
    """Where three steps waited for the device, as torch tells."""
    if runtime.device.type != "cuda":
        return []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(3):
            loop.advance(batches)
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def time_copy(batch: Batch, device: torch.device) -> float:
    """Milliseconds of a batch from the host's memory to the device's."""
    clock = Clock(device)
    for _ in range(5):
        batch.to(device, non_blocking=True)
    return clock.stop() / 5


def trace_steps(loop: Loop, config: Config, runtime: Runtime, folder: Path) -> dict[str, Any]:
    """Writes a trace of some steps; what of it says where the device's time goes."""
    batches = chain.from_iterable(repeat(take_batches(config, runtime)))
    loop.pipeline.reset()
    profiler = StepProfiler(TRACED_STEPS, folder, runtime)
    for _ in range(PROFILE_WARM_UP_STEPS + TRACED_STEPS):
        loop.advance(batches)
        profiler.advance()
    profiler.close()
    return sum_kernels(json.loads(gzip.decompress(profiler.path.read_bytes()))["traceEvents"], TRACED_STEPS)


def sum_kernels(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Milliseconds a step of the kernels that take most, and the share of the time in which none ran."""
    kernels = sorted(
        (event["ts"], event["dur"], event["name"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")
    )
    if not kernels:
        return {}
    totals: dict[str, float] = {}
    idle, busy_until = 0.0, kernels[0][0]
    for start, duration, name in kernels:
        totals[name] = totals.get(name, 0.0) + duration
        idle += max(0.0, start - busy_until)
        busy_until = max(busy_until, start + duration)
    largest = sorted(totals.items(), key=lambda item: -item[1])[:25]
    return {
        "idle_share": idle / (busy_until - kernels[0][0]),
        "kernels_per_step": len(kernels) / steps,
        "kernel_ms_per_step": {name[:120]: total / 1000 / steps for name, total in largest},
    }


def run_case(case: Case) -> dict[str, Any]:
    """All that is measured of a case."""
    with start_runtime() as runtime:
        torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"
        config = make_config(case, runtime.device)
        started = time.perf_counter()
        loop = Loop(config, runtime)
        result: dict[str, Any] = {
            "case": asdict(case),
            "model": asdict(config.model),
            "tables_gib": sum(config.model.table_rows) * DIM * 4 / 2**30,
            "build_seconds": time.perf_counter() - started,
            "ids": {name: measure_ids(loop, config, case, runtime, exponent) for name, exponent in EXPONENTS.items()},
            "peak_memory_gib": peak_memory_gib(runtime.device),
        }
        losses = loop.meter.drain()
        result["mean_loss"] = losses.loss
        if case.trace is not None:
            result["trace"] = trace_steps(loop, config, runtime, Path(case.trace))
    return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    quieten_libraries()
    print(f"RESULT {json.dumps(run_case(Case(**json.loads(sys.argv[1]))))}", flush=True)
