import pytest
import torch

from dlrm.assembly.build import build_model, make_sharder, plan_run
from dlrm.assembly.optimizers import build_optimizer
from dlrm.assembly.pipeline import build_pipeline, check_pipeline, table_kernels
from dlrm.config.config import Config, ModelConfig, TrainingConfig
from dlrm.errors import ConfigError
from dlrm.loader.run_data import hotness_of
from dlrm.ranks.runtime import start_runtime
from dlrm.sharding.cluster import Cluster
from dlrm.sharding.placement import Placement, TablePlacement
from dlrm.sharding.shard import shard_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def placement_of(*kernels: str) -> Placement:
    tables = [
        TablePlacement(f"t_cat_{i}", 8, 4, 0.0, 0.0, "table_wise", k, (0,), (0.0,)) for i, k in enumerate(kernels)
    ]
    return Placement(1, tuple(tables))


def test_prefetch_is_for_tables_that_a_gpu_caches():
    check_pipeline("prefetch", placement_of("fused", "fused_uvm_caching"), CUDA)
    with pytest.raises(ConfigError, match=r"expected a table with the kernel fused_uvm_caching, .* dense, fused\."):
        check_pipeline("prefetch", placement_of("fused", "dense", "fused"), CUDA)
    with pytest.raises(ConfigError, match=r"--pipeline prefetch: expected a CUDA device, got cpu"):
        check_pipeline("prefetch", placement_of("fused_uvm_caching"), CPU)


@pytest.mark.parametrize("name", ["base", "sparse_dist"])
def test_the_others_run_anywhere(name):
    check_pipeline(name, placement_of("dense"), CPU)
    check_pipeline(name, placement_of("fused_uvm_caching"), CUDA)


def test_prefetch_starts_each_pass_with_no_cache_line_locked():
    config = Config(training=TrainingConfig(seed=0, pipeline="prefetch"), model=ModelConfig(num_embeddings=8))
    with start_runtime() as runtime:
        model = build_model(config, runtime)
        plan = plan_run(config, Cluster("cpu", 1, 1, 2**30), model, hotness_of(config))
        sharded = shard_model(model, plan, make_sharder(config), runtime.device, 0)
        kernels = list(table_kernels(sharded))
        assert kernels
        for kernel in kernels:
            assert kernel.prefetch_pipeline
            kernel.lxu_cache_locking_counter = torch.ones(4, 32, dtype=torch.int32)  # a GPU's kernel has one
        optimizer = build_optimizer(sharded, config.optimizer)
        build_pipeline("prefetch", sharded, optimizer, runtime.device).reset()
        assert not any(kernel.lxu_cache_locking_counter.any() for kernel in kernels)
