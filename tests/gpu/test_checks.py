"""The checks of a GPU, of which a CPU does the quick ones that it can."""

import warnings

import pytest

from tests.gpu.checks import CHECKS, GPU_ONLY, ON_GPU

ON_CPU_TOO = ("nccl_group_of_one_rank", "tables_sgd", "tables_adagrad", "tables_rowwise_adagrad")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ON_CPU_TOO else pytest.mark.gpu) for name in CHECKS],
)
def test_check(name: str) -> None:
    if name not in ON_CPU_TOO and not ON_GPU:
        pytest.skip("needs a CUDA device")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries on a device where nobody has counted them yet
        CHECKS[name]()


def test_those_that_need_a_gpu_are_known() -> None:
    assert set(CHECKS) > GPU_ONLY
    assert not GPU_ONLY & set(ON_CPU_TOO)
