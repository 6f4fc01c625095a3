"""Triton builds the fused interaction for Hopper GPUs, of which none is needed for that.

For a CPU: pip install --no-deps --target FOLDER triton==3.7.1, then PYTHONPATH=FOLDER, without TRITON_INTERPRET.
"""

import os
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: it comes with the CUDA packages")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not built", allow_module_level=True)
from dlrm.kernels import triton_interaction  # noqa: E402

COLUMNS = list(range(0, 26 * 128, 128))


def build(kernel: Any, dense: str, sources: tuple[str, ...], precision: str) -> Any:
    """A kernel for MLPerf's 27 vectors of 128, with arguments as aligned as torch's are."""
    constants = triton_interaction._constants(torch.empty(1, 128), COLUMNS) | {"PRECISION": precision}
    num_warps = constants.pop("num_warps")
    kinds = {"table": "*i32", "batch_size": "i32", "dense_stride": "i32"}
    for name in ("dense", "out", "grad", "grad_dense"):
        kinds[name] = f"*{dense}"
    for name in ("sources", "grad_sources"):
        kinds[name] = tuple(f"*{source}" for source in sources)
    for name in ("source_strides", "grad_strides"):
        kinds[name] = ("i32",) * len(sources)
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for position, name in enumerate(kernel.arg_names):
        if isinstance(kinds.get(name), tuple):
            attributes |= {(position, part): aligned for part in range(len(sources))}
        elif name in ("dense", "out", "grad", "grad_dense", "dense_stride"):
            attributes[position,] = aligned
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: kinds.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


@pytest.mark.parametrize(
    ("dense", "sources", "precision"),
    [
        ("bf16", ("bf16",), "ieee"),
        ("bf16", ("fp32", "bf16"), "ieee"),
        ("fp32", ("fp32",), "tf32"),
        ("fp32", ("fp32",), "ieee"),
    ],
)
def test_kernels_are_built_for_hopper(dense: str, sources: tuple[str, ...], precision: str) -> None:
    for kernel in (triton_interaction._forward_kernel, triton_interaction._backward_kernel):
        ptx = build(kernel, dense, sources, precision).asm["ptx"]
        assert ("mma.sync" in ptx) == (dense == "bf16" or precision == "tf32")
        assert "ld.global.v4" in ptx  # 16 bytes a thread at a time
