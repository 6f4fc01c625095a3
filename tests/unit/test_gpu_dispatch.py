"""Which operators take GPU tensors; what they compute is for tests/gpu."""

from types import SimpleNamespace

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec.optim.keyed import KeyedOptimizerWrapper

from dlrm.assembly.optimizers import Optimizers
from dlrm.kernels import interaction
from dlrm.sharding.host.lookups import round_lookups

DENSE_BD = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("dtype", "num_vectors", "is_for_triton"),
    [
        (torch.float32, 27, True),
        (torch.bfloat16, 64, True),
        (torch.float32, 1, False),
        (torch.float32, 65, False),
        (torch.float64, 27, False),
    ],
)
def test_triton_takes_what_it_can(
    dtype: torch.dtype, num_vectors: int, is_for_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, columns = [torch.zeros(2, 4 * 70, dtype=dtype)], [[4 * i for i in range(num_vectors - 1)]]
    monkeypatch.setattr(interaction, "_has_triton", lambda: True)
    assert interaction._is_for_triton(DENSE_BD, sources, columns) == is_for_triton
    monkeypatch.setattr(interaction, "_has_triton", lambda: False)
    assert not interaction._is_for_triton(DENSE_BD, sources, columns)


def test_pooled_rows_on_a_gpu_are_rounded_where_they_are_whole() -> None:
    def lookup() -> SimpleNamespace:
        kernel = SimpleNamespace(output_dtype=SparseType.FP32.as_int())
        return SimpleNamespace(_emb_modules=[SimpleNamespace(emb_module=kernel)], _dummy_embs_tensor=torch.zeros(0))

    module = nn.Module()
    module._lookups = [lookup(), lookup()]
    module._sharding_types = ["table_wise", "row_wise"]
    round_lookups(nn.Sequential(module), torch.bfloat16)
    dtypes = [own._emb_modules[0].emb_module.output_dtype for own in module._lookups]
    assert dtypes == [SparseType.BF16.as_int(), SparseType.FP32.as_int()]
    assert [own._dummy_embs_tensor.dtype for own in module._lookups] == [torch.bfloat16, torch.float32]


def test_gradients_are_dropped_between_steps() -> None:
    weight, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = KeyedOptimizerWrapper({"weight": weight}, lambda parameters: torch.optim.SGD(parameters, lr=1))
    all_parts = Optimizers([optimizer], [frozen])
    (weight * frozen).sum().backward()
    all_parts.zero_grad()
    assert weight.grad is frozen.grad is None
