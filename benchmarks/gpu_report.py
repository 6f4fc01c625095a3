"""What benchmarks/gpu.py makes of its measurements: floors, and the tables that people read."""

from typing import Any

from dlrm.bench.harness.floor import Ceilings, Floor
from dlrm.cost.work import Work

GOAL = 5.5e6
"""Samples/s of the public example on eight A100 GPUs."""


def add_floor(ids: dict[str, Any], precision: str, rates: dict[str, float]) -> None:
    """Puts the least time of a step beside its measured one: the longer of products at the measured rate and bytes at
    a copy's, as in `dlrm bench`, and their sum."""
    floor = Floor(Work(**ids["work"]), Ceilings(rates[precision], rates["bytes"]))
    ids["floor"] = floor.to_json()
    ids["share_of_floor"] = 1000 * floor.seconds / ids["median_step_ms"]
    ids["share_of_floor_sum"] = 1000 * floor.sum_seconds / ids["median_step_ms"]


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
