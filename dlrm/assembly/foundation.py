"""Model, plan, optimizer, pipeline and data of a config, put together on the ranks there are."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipeline
from torchrec.optim.keyed import CombinedOptimizer

from dlrm.assembly.build import build_model, make_sharder, plan_run
from dlrm.assembly.dense_execution import check_arithmetic, check_dense_execution
from dlrm.assembly.optimizers import build_optimizer
from dlrm.assembly.pipeline import build_pipeline, check_pipeline
from dlrm.checkpoint.tensors import State, count_state, training_state
from dlrm.config.checks import check_profile
from dlrm.config.config import Config
from dlrm.cost.optimizer_state import table_state_floats
from dlrm.dataset.binary_days import STAGES, Stage
from dlrm.dataset.cautions import Folded, compare_folded, describe_days, find_copies, measure_each_part
from dlrm.kernels.native import describe_kernels
from dlrm.loader.batch import Batch
from dlrm.loader.run_data import RunData, budget_of, build_splits, draw_run_companions
from dlrm.loader.split import Split
from dlrm.model.dlrm import Output
from dlrm.ranks.runtime import Runtime, derive_seed, on_every_rank, on_main_rank
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.placement import Placement
from dlrm.sharding.search import describe_plan
from dlrm.sharding.shard import shard_model
from dlrm.system.allocator import describe_allocator


@dataclass(frozen=True)
class Foundation:
    """A sharded model and data for it: what training and scoring stand on.

    Attributes:
        data_opened: when opening the data began, in seconds since the epoch.
        folded: of each part of the data, the share of ids beyond their tables; none for random data.
    """

    config: Config
    runtime: Runtime
    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    pipeline: TrainPipeline[Batch, Output]
    splits: Mapping[Stage, Split]
    placement: Placement
    data_opened: float
    folded: Sequence[Folded] = ()

    def state(self) -> State:
        """All tensors of a training. Collective."""
        state = training_state(self.model, self.optimizer, self.runtime)
        if (frequencies := self.splits["train"].frequencies) is None:
            return state
        return {**state, **count_state(frequencies.total(self.runtime), self.runtime)}


def lay_foundation(
    config: Config,
    runtime: Runtime,
    stages: Sequence[Stage] = STAGES,
    *,
    is_restored: bool = False,
    is_quiet: bool = False,
) -> Foundation:
    """Plans, opens the data, draws the weights; prints what it runs on and what the data is. Collective.

    Args:
        config: with a seed.
        stages: splits to open.
        is_restored: whether a checkpoint is about to bring all weights, so that none are drawn.
        is_quiet: whether nothing is printed, and the data not looked at for what is suspicious.

    Raises:
        DlrmError: for what the user can fix.
    """
    on_main_rank(runtime, lambda: check_dense_execution(config.training.dense_execution, runtime.device))
    on_every_rank(runtime, lambda: check_arithmetic(config.training, runtime.device))
    if runtime.is_main and not is_quiet:
        print(runtime.describe(), flush=True)
        if runtime.device.type == "cpu":
            print(f"{describe_kernels()}; {describe_allocator()}", flush=True)
    seed = config.training.seed
    assert seed is not None
    torch.manual_seed(derive_seed(seed, "rank", runtime.rank))
    torch.backends.cuda.matmul.allow_tf32 = config.training.arithmetic == "tf32"
    data_opened = time.time()
    data = on_every_rank(runtime, lambda: RunData.open(config, stages))
    statistics = None
    if config.model.needs_dense_statistics and not is_restored:
        statistics = on_main_rank(runtime, data.measure_dense)
    model = build_model(config, runtime, statistics)
    cluster = Cluster.detect(runtime, config.sharding)
    plan = on_main_rank(runtime, lambda: plan_run(config, cluster, model, data.hotness))
    placement = describe_plan(plan, model, runtime.world_size, partial(table_state_floats, config))
    on_main_rank(runtime, lambda: check_pipeline(config.training.pipeline, placement, runtime.device))
    budget = budget_of(runtime)
    budget.spend(placement.host_bytes(cluster.device, cluster.local_world_size) // runtime.block_size)
    companions = draw_run_companions(data, runtime, budget)
    splits = on_every_rank(runtime, lambda: build_splits(data, runtime, companions, budget))
    folded = [] if is_quiet else on_main_rank(runtime, lambda: _tell_of_data(config, splits))
    if "train" in splits:
        on_main_rank(runtime, lambda: check_profile(config, splits["train"].partition.num_steps))
    weights_seed = None if is_restored else seed
    sharded = shard_model(model, plan, make_sharder(config), runtime.device, weights_seed, config.frozen)
    optimizer = build_optimizer(sharded, config.optimizer, config.frozen)
    pipeline = build_pipeline(config.training.pipeline, sharded, optimizer, runtime.device)
    return Foundation(config, runtime, sharded, optimizer, pipeline, splits, placement, data_opened, folded)


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
