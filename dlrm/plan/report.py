"""The facts of a forecast as lines of text. No torch here."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from dlrm.sharding.placement import TablePlacement, show_tables
from dlrm.system.console import align, plural

PARTS = ("weights", "optimizer", "activations", "reserve", "free")


def to_text(facts: Mapping[str, Any], described: str) -> list[str]:
    """The lines that `dlrm plan` prints. `described` is the cluster in words."""
    head = [
        ("cluster", f"{described}; {facts['cluster']['device_memory_gib']:.1f} GiB each"),
        ("batch", _show_batch(facts)),
        ("tables", f"{facts['tables_gib']:.2f} GiB of weights, {facts['optimizer_gib']:.2f} GiB of optimizer state"),
        ("arithmetic", f"{facts['precision']}, {facts['optimizer']}, pipeline {facts['pipeline']}"),
    ]
    return [
        *align(head),
        "",
        *show_tables([TablePlacement(**table) for table in facts["tables"]]),
        *_show_host_tables(facts["tables"]),
        "",
        *_show_memory(facts["memory_gib_per_rank"]),
        "",
        *(_show_collectives(facts["collectives"]) if facts["collectives"] else ["one rank: nothing travels"]),
        "",
        *_show_step(facts["step"]),
        "",
        *_show_assumptions(facts["cluster"]),
    ]


def _show_batch(facts: Mapping[str, Any]) -> str:
    recipe = facts["recipe_batch"]
    shown = f"{facts['batch_size']:,} samples a rank, {facts['global_batch_size']:,} a step"
    if recipe is None or facts["global_batch_size"] == recipe["global_batch_size"]:
        return shown
    batch, ranks = recipe["batch_size"], plural(recipe["ranks"], "rank")
    shown += f"; the recipe's step is {recipe['global_batch_size']:,}: {ranks} of {batch:,}"
    same, rest = divmod(recipe["global_batch_size"], facts["cluster"]["world_size"])
    return shown if rest or not same else f"{shown} (--batch_size {same} gives that here)"


def _show_host_tables(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    hosted = [table for table in tables if "uvm" in table["kernel"]]
    if not hosted:
        return []
    gib, names = sum(table["gib"] for table in hosted), ", ".join(table["table"] for table in hosted)
    cached = any(table["kernel"] == "fused_uvm_caching" for table in hosted)
    return [
        "",
        f"Host memory: {gib:.2f} GiB of weights ({names}) are read over the bus by UVM kernels"
        f"{', but for rows in a cache on the GPU' if cached else ''}.",
    ]


def _show_memory(ranks: Sequence[Mapping[str, float]]) -> list[str]:
    """A line for each run of ranks whose figures are the same."""
    has_host = any(rank["on_host"] for rank in ranks)
    names = (*PARTS, "on_host") if has_host else PARTS
    shown = [tuple(f"{rank[name]:.2f}" for name in names) for rank in ranks]
    lines = []
    for cells, group in groupby(enumerate(shown), key=lambda entry: entry[1]):
        numbers = [number for number, _ in group]
        lines.append((f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]), *cells))
    head = ("GiB of rank", *PARTS, *(("in host memory",) if has_host else ()))
    return align([head, *lines], right=range(1, len(head)))


def _show_collectives(collectives: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ("MB of a step", "from a rank", "between hosts, a host", "all ranks", "ms", "bound by")
    rows = [
        (
            one["name"],
            f"{one['bytes_per_rank'] / 1e6:,.2f}",
            f"{one['inter_host_bytes_per_host'] / 1e6:,.2f}",
            f"{one['num_bytes'] / 1e6:,.2f}",
            f"{one['time_ms']:,.3f}",
            one["bound_by"],
        )
        for one in collectives
    ]
    return align([head, *rows], right={1, 2, 3, 4})


def _show_step(step: Mapping[str, Any]) -> list[str]:
    total = step["step_time_ms"]
    exposed = step["exposed_communication_time_ms"]
    hidden = max(0.0, step["communication_time_ms"] - exposed)
    parts = (("lookup", step["lookup_time_ms"]), ("communication", exposed), ("dense", step["dense_time_ms"]))
    rows = [
        (name, f"{time:,.3f} ms", f"{time / total:.0%}", f"{hidden:,.3f} ms more hidden behind the rest" * (i == 1))
        for i, (name, time) in enumerate(parts)
    ]
    rows.append(("step", f"{total:,.3f} ms", "", f"bound by {step['bound_by']}"))
    rows.append(("samples/s", f"{step['samples_per_second']:,.0f}", "", "expected, not measured"))
    return align(rows, right={1, 2})


def _show_assumptions(cluster: Mapping[str, Any]) -> list[str]:
    shares = ", ".join(f"{cluster[f'{name}_efficiency']:.0%} of {name}" for name in ("matrix", "memory", "network"))
    return [f"Computed with {shares} rates. docs/design/plan.md has the formulas, and says what of this was measured."]
