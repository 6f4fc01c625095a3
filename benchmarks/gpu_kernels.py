"""What a device can do, and how near to it the fused interaction comes; part of benchmarks/gpu.py.

Prints a line of JSON that begins with RESULT.

Shapes: B samples, D embedding dimension, V vectors that interact.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

DIM = 128
VECTORS = 27
PAIRS = VECTORS * (VECTORS - 1) // 2


class Clock:
    """Milliseconds between points of a device's work, told without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(device)
        self._points: list[Any] = []
        self.lap()

    def lap(self) -> None:
        """A point."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._points.append(event)
        else:
            self._points.append(time.perf_counter())

    def stop(self) -> float:
        """A last point; milliseconds from the first to it. Waits for the device."""
        self.lap()
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._between(self._points[0], self._points[-1])

    def laps(self) -> list[float]:
        """Milliseconds between neighbouring points, all but the last. Call after `stop`."""
        points = self._points[:-1]
        return [self._between(one, other) for one, other in pairwise(points)]

    def _between(self, start: Any, stop: Any) -> float:
        return start.elapsed_time(stop) if self._on_gpu else 1000 * (stop - start)


def time_call(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median milliseconds of a call, after three that warm up."""
    for _ in range(3):
        call()
    clock = Clock(device)
    for _ in range(repeats):
        call()
        clock.lap()
    clock.stop()
    return statistics.median(clock.laps())


def measure_ceilings(device: torch.device, size: int, copied_bytes: int) -> dict[str, float]:
    """Operations a second of a large matrix product in each precision; bytes a second, read and written, of a copy."""
    rates = {}
    for precision in ("fp32", "tf32", "bf16"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[precision] = 2 * size**3 / (time_call(lambda: left @ right, device) / 1000)  # noqa: B023 - called here
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(copied_bytes // 4, device=device)
    target = torch.empty_like(source)
    rates["bytes"] = 2 * copied_bytes / (time_call(lambda: target.copy_(source), device) / 1000)
    return rates


def unfused(dense_BD: Tensor, source: Tensor) -> Tensor:
    """The interaction as PyTorch's own operators make it."""
    vectors_BVD = torch.cat((dense_BD, source), dim=1).unflatten(1, (VECTORS, DIM))
    rows, others = torch.triu_indices(VECTORS, VECTORS, 1, device=dense_BD.device)
    return torch.cat((dense_BD, torch.bmm(vectors_BVD, vectors_BVD.transpose(1, 2))[:, rows, others]), dim=1)


def measure_interaction(device: torch.device, batch_size: int) -> list[dict[str, Any]]:
    """Forward and backward of the fused kernel over block sizes, and of plain operators."""
    from dlrm.kernels import triton_interaction

    columns = [list(range(0, (VECTORS - 1) * DIM, DIM))]
    results = []
    for precision in ("bf16", "tf32", "fp32"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        dense_BD = torch.randn(batch_size, DIM, device=device).to(dtype).requires_grad_()
        source = torch.randn(batch_size, (VECTORS - 1) * DIM, device=device).to(dtype).requires_grad_()

        def fused(dense: Tensor, source: Tensor) -> Tensor:
            return triton_interaction.triton_dot_interaction(dense, [source], columns)

        results.append({"precision": precision, "kernel": "torch", **time_both(unfused, dense_BD, source, device)})
        for samples in (1, 2, 4):
            for num_warps in (2, 4, 8):
                triton_interaction.SAMPLES_PER_PROGRAM, triton_interaction.NUM_WARPS = samples, num_warps
                times = time_both(fused, dense_BD, source, device)
                block = {"samples_per_program": samples, "num_warps": num_warps}
                results.append({"precision": precision, "kernel": "triton", **block, **times})
    torch.backends.cuda.matmul.allow_tf32 = False
    return results


def time_both(
    call: Callable[[Tensor, Tensor], Tensor], dense_BD: Tensor, source: Tensor, device: torch.device
) -> dict[str, float]:
    """Milliseconds forward and backward, and the bytes that each must move."""
    out = call(dense_BD, source)
    upstream = torch.randn_like(out)
    inputs = dense_BD.nbytes + source.nbytes
    return {
        "forward_ms": time_call(lambda: call(dense_BD, source), device),
        "backward_ms": time_call(
            lambda: torch.autograd.grad(out, (dense_BD, source), upstream, retain_graph=True), device
        ),
        "forward_bytes": inputs + out.nbytes,
        "backward_bytes": 2 * inputs + out.nbytes,
    }


def main() -> None:
    """Measures with sizes that fill a GPU, or with small ones where told so."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_small = sys.argv[1:] == ["small"]
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ceilings": measure_ceilings(device, *((256, 1 << 20) if is_small else (8192, 1 << 32))),
        "interaction": measure_interaction(device, 64 if is_small else 65_536) if device.type == "cuda" else [],
    }
    print(f"RESULT {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
