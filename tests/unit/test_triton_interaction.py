"""The fused interaction against its twin in float64: on a GPU, or in Triton's interpreter.

Triton comes with the CUDA packages only. For a CPU: pip install --no-deps --target FOLDER triton==3.7.1, then
TRITON_INTERPRET=1 PYTHONPATH=FOLDER python -m pytest THIS_FILE.
"""

import os

import pytest
import torch

from tests.gpu.twins import BF16, INTERACTION_CASES, InteractionCase, dot_interaction_in_float64, relative_error

pytest.importorskip("triton", reason="Triton is not installed: it comes with the CUDA packages")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
from dlrm.kernels.triton_interaction import triton_dot_interaction

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", INTERACTION_CASES)
def test_products_and_gradients_are_the_twins(name: str) -> None:
    case = INTERACTION_CASES[name]
    dense_BD, sources = case.draw(DEVICE)
    out_BP = triton_dot_interaction(dense_BD, sources, case.columns)
    expected_BP = dot_interaction_in_float64(dense_BD, sources, case.columns)
    assert out_BP.dtype == case.dense
    assert relative_error(out_BP, expected_BP) < (1e-2 if case.dense == BF16 else 1e-6)

    upstream_BP = torch.randn(out_BP.shape, generator=torch.Generator().manual_seed(8)).to(DEVICE, out_BP.dtype)
    inputs = [dense_BD, *sources]
    got = torch.autograd.grad(out_BP, inputs, upstream_BP)
    expected = torch.autograd.grad(expected_BP, inputs, upstream_BP.double())
    for tensor, ours, theirs in zip(inputs, got, expected, strict=True):
        assert ours.dtype == tensor.dtype
        assert relative_error(ours, theirs) < (1e-2 if BF16 in (case.dense, tensor.dtype) else 1e-6)


def test_rows_that_lie_apart_and_columns_that_do_not_touch() -> None:
    case = INTERACTION_CASES["27 vectors, one source"]
    dense_BD, (source,) = case.draw(DEVICE)
    apart = torch.empty(case.batch_size, 1000, device=DEVICE)[:, 100 : 100 + source.size(1)].copy_(source)
    across = source.detach().t().contiguous().t()
    expected = triton_dot_interaction(dense_BD, [source], case.columns)
    for view in (apart, across):
        torch.testing.assert_close(triton_dot_interaction(dense_BD, [view], case.columns), expected, rtol=0, atol=0)


def test_what_autograd_and_the_compiler_need_is_registered() -> None:
    case = INTERACTION_CASES["three sources"]
    dense_BD, sources = case.draw(DEVICE)
    flat = [column for own in case.columns for column in own]
    torch.library.opcheck(
        torch.ops.dlrm.triton_dot_interaction.default, (dense_BD, sources, flat, [len(own) for own in case.columns])
    )


def test_a_compiled_function_holds_it_in_one_graph() -> None:
    case = INTERACTION_CASES["three sources"]
    dense_BD, sources = case.draw(DEVICE)

    def score(dense: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        return triton_dot_interaction(dense, parts, case.columns).relu().sum()

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(dense_BD, sources), sources),
        torch.autograd.grad(score(dense_BD, sources), sources),
    )


BROKEN = [
    (InteractionCase(2, 16, ((0, 8),), (32,)), "do not overlap"),
    (InteractionCase(2, 16, ((0, 20),), (32,)), "within 32 columns"),
    (InteractionCase(2, 16, ((-1,),), (32,)), "do not overlap"),
    (InteractionCase(2, 4, (tuple(range(0, 256, 4)),), (256,)), "65 vectors, expected 2 to 64"),
    (InteractionCase(2, 16, ((),), (32,)), "1 vectors, expected 2 to 64"),
    (InteractionCase(2, 16, ((0,),), (16,), torch.float64), "expected float32 or bfloat16"),
]


@pytest.mark.parametrize(("case", "message"), BROKEN)
def test_what_the_kernel_does_not_take_is_refused(case: InteractionCase, message: str) -> None:
    dense_BD, sources = case.draw(DEVICE)
    with pytest.raises(ValueError, match=message):
        triton_dot_interaction(dense_BD, sources, case.columns)
