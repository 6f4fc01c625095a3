"""Model, data and optimizer of a config, put together on the ranks there are."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.allocator import describe_allocator
from dlrm.config import Config
from dlrm.data.binary_days import Stage
from dlrm.data.cautions import Folded, compare_folded, describe_days, find_copies, measure_each_part
from dlrm.data.splits import STAGES, Split, draw_run_companions, open_run_splits
from dlrm.kernels.native import describe_kernels
from dlrm.metrics.sinks import Sinks
from dlrm.runtime import Runtime, derive_seed, on_every_rank, on_main_rank
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.plan import Placement, describe_plan
from dlrm.sharding.shard import shard_model
from dlrm.train.build import build_model, make_sharder, plan_run
from dlrm.train.dense_execution import check_arithmetic, check_dense_execution
from dlrm.train.optimizers import build_optimizer
from dlrm.train.pipeline import check_pipeline
from dlrm.train.profiling import check_profile
from dlrm.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Foundation:
    """A sharded model and data for it.

    Attributes:
        data_opened: when opening the data began, in seconds since the epoch.
        folded: of each part of the data, the share of ids beyond their tables; none for random data.
    """

    runtime: Runtime
    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    splits: dict[Stage, Split]
    placement: Placement
    data_opened: float
    folded: list[Folded]


def assemble(config: Config, runtime: Runtime) -> tuple[Trainer, Foundation]:
    """A trainer that has not begun, and what it stands on. Collective. The config has a seed.

    Raises:
        DlrmError: for what the user can mend.
    """
    base = lay_foundation(config, runtime, STAGES)
    return Trainer(config, base.runtime, base.splits, base.model, base.optimizer, Sinks([])), base


def lay_foundation(
    config: Config, runtime: Runtime, stages: Sequence[Stage], *, is_restored: bool = False
) -> Foundation:
    """What training and scoring have in common: says what it runs on, plans, opens the data, draws the weights.

    Collective. The config has a seed.

    Args:
        stages: splits to open.
        is_restored: whether a checkpoint is about to bring all weights, so that none are drawn.

    Raises:
        DlrmError: for what the user can mend.
    """
    on_main_rank(runtime, lambda: check_dense_execution(config.training.dense_execution, runtime.device))
    on_every_rank(runtime, lambda: check_arithmetic(config.training, runtime.device))
    if runtime.is_main:
        print(runtime.describe(), flush=True)
        if runtime.device.type == "cpu":
            print(f"{describe_kernels()}; {describe_allocator()}", flush=True)
    seed = config.training.seed
    assert seed is not None
    torch.manual_seed(derive_seed(seed, "rank", runtime.rank))
    torch.backends.cuda.matmul.allow_tf32 = config.training.arithmetic == "tf32"
    data_opened = time.time()
    model = build_model(config, runtime, is_restored=is_restored)
    cluster = Cluster.detect(runtime, config.sharding)
    plan = on_main_rank(runtime, lambda: plan_run(config, cluster, model))
    placement = describe_plan(plan, model, runtime.world_size, config.table_state_floats)
    on_main_rank(runtime, lambda: check_pipeline(config.training.pipeline, placement, runtime.device))
    on_host = placement.host_bytes(cluster) * runtime.local_world_size // runtime.block_size
    runtime = dataclasses.replace(runtime, host_memory_bytes=runtime.host_memory_bytes - on_host)
    companions = draw_run_companions(config, runtime, stages)
    splits = on_every_rank(runtime, lambda: open_run_splits(config, runtime, companions, stages))
    folded = on_main_rank(runtime, lambda: _tell_of_data(config, splits))
    if "train" in splits:
        on_main_rank(runtime, lambda: check_profile(config, splits["train"].partition.num_steps))
    frozen = config.frozen
    sharded = shard_model(model, plan, make_sharder(config), runtime.device, None if is_restored else seed, frozen)
    optimizer = build_optimizer(sharded, config.optimizer, frozen)
    return Foundation(runtime, sharded, optimizer, splits, placement, data_opened, folded)


def _tell_of_data(config: Config, splits: Mapping[Stage, Split]) -> list[Folded]:
    """Says which days train and which is held out, and what is suspicious about them."""
    rows = {stage: split.rows for stage, split in splits.items() if split.rows is not None}
    if not rows:
        return []
    folded = measure_each_part(rows, np.array(config.model.table_rows))
    lines = [describe_days(rows)]
    if "train" in rows:
        lines += [*find_copies(rows), compare_folded(folded)]
    print("\n".join(filter(None, lines)), flush=True)
    return folded
