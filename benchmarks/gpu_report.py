"""What benchmarks/gpu.py makes of its measurements: floors, and the tables that people read."""

from itertools import pairwise
from typing import Any

GOAL = 5.5e6
"""Samples/s of the public example on eight A100 GPUs."""


def floor_seconds(result: dict[str, Any], distinct_rows: float, ceilings: dict[str, float]) -> dict[str, float]:
    """Least seconds of a step: matrix work at the measured rate, bytes at the measured bandwidth, and their sum.

    Operations are three products of each layer, less the gradient of the integers. Bytes are the distinct rows, read
    and updated once; the vectors that interact, activations and their gradients, each written and read once.
    """
    case, model = result["case"], result["model"]
    samples, dim, precision = case["batch_size"], model["embedding_dim"], case["precision"]
    dense = (13, *model["dense_arch_layer_sizes"])
    over = (dim + 27 * 26 // 2, *model["over_arch_layer_sizes"])
    weights = sum(one * other for layers in (dense, over) for one, other in pairwise(layers))
    pairs = 27 * 26 // 2
    flop = samples * (2 * (3 * weights - dense[0] * dense[1]) + 6 * dim * pairs)
    width = 2 if precision == "bf16" else 4
    vectors = 2 * 2 * 27 * dim
    activations = 2 * (sum(dense[1:-1]) + sum(over))
    state = {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim}[case["optimizer"]]
    rows = distinct_rows * 4 * (3 * dim + 2 * state)
    num_bytes = samples * (width * (vectors + activations) + 4 * (13 + 26 + 1)) + rows
    matrix, memory = flop / ceilings[precision], num_bytes / ceilings["bytes"]
    return {"flop": flop, "bytes": num_bytes, "matrix": matrix, "memory": memory, "sum": matrix + memory}


def to_markdown(result: dict[str, Any]) -> str:
    """The tables that people read."""
    device = result["device"]
    text = [f"# {device.get('device', 'no device')}, commit {result['commit']}", ""]
    if ceilings := device.get("ceilings"):
        rates = ", ".join(f"{ceilings[name] / 1e12:.1f} TFLOP/s {name}" for name in ("fp32", "tf32", "bf16"))
        text += [f"Measured: {rates}; a copy {ceilings['bytes'] / 1e12:.2f} TB/s.", ""]
    text += ["| case | ids | samples/s | times the goal | ms a step | share of the floor | peak GiB | waits |"]
    text += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for case in result["cases"]:
        name = case["case"]["name"]
        if "ids" not in case:
            text.append(f"| {name} | {case['error'].splitlines()[-1][:80] if case['error'] else ''} | | | | | | |")
        for kind, ids in case.get("ids", {}).items():
            rate = ids["samples_per_second"]
            cells = (
                *(name, kind, f"{rate:,.0f}", f"{rate / GOAL:.2f}", f"{ids['median_step_ms']:.2f}"),
                *(f"{ids.get('share_of_floor', float('nan')):.2f}", f"{case['peak_memory_gib']:.1f}"),
                str(len(ids["host_syncs"])),
            )
            text.append(f"| {' | '.join(cells)} |")
    text += ["", "| kernel | precision | block | forward ms | backward ms |", "| --- | --- | --- | --- | --- |"]
    for row in device.get("interaction", []):
        block = f"{row['samples_per_program']} x {row['num_warps']}" if "num_warps" in row else ""
        times = f"{row['forward_ms']:.3f} | {row['backward_ms']:.3f}"
        text.append(f"| {row['kernel']} | {row['precision']} | {block} | {times} |")
    text += ["", "| check | |", "| --- | --- |"]
    for check in result["checks"]:
        text.append(
            f"| {check['check']} | {'passed' if check['passed'] else 'FAILED: ' + _last_line(check['error'])} |"
        )
    return "\n".join(text) + "\n"


def _last_line(text: str) -> str:
    return next((line[:160].replace("|", "/") for line in reversed(text.splitlines()) if line.strip()), "")
