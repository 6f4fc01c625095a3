import pytest
import torch

from dlrm.errors import ConfigError
from dlrm.sharding.plan import Placement, TablePlacement
from dlrm.train.pipeline import build_pipeline, check_pipeline

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
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Module())
    model[1].register_buffer("lxu_cache_locking_counter", torch.ones(4, 32, dtype=torch.int32))
    build_pipeline("prefetch", model, torch.optim.SGD(model.parameters()), CPU).reset()
    assert not model[1].lxu_cache_locking_counter.any()
