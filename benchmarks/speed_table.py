"""The table of training speed, of the JSON files that benchmarks/train_matrix.sh writes."""

from collections.abc import Iterable
from typing import Any

from dlrm.bench.harness.provenance import short_commit
from dlrm.errors import DatasetError
from dlrm.system.console import plural

_COLUMNS = (
    "ids",
    "tables, GiB",
    "optimizer",
    "ranks",
    "batch",
    "ours in",
    "ratio",
    "floor",
    "at the floor",
    "memory, GiB",
)


def draw_tables(results: list[dict[str, Any]]) -> str:
    """A table for each machine and commit, the longest first.

    Raises:
        DatasetError: if there is no result to draw.
    """
    results = [result for result in results if result.get("case") == "train"]
    if not results:
        raise DatasetError("no results of `dlrm bench train`. Run benchmarks/train_matrix.sh first.")
    measured_on: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        measured_on.setdefault(describe_machine(result), []).append(result)
    longest_first = sorted(measured_on.items(), key=lambda item: -len(item[1]))
    return "\n".join(f"{machine}\n\n{draw_table(own)}" for machine, own in longest_first)


def summarize(results: list[dict[str, Any]]) -> str:
    """How many shapes were measured on each CPU in each arithmetic, between which ratios, and which ones the floor
    allows: one line each."""
    measured_in: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        measured_in.setdefault((result["machine"]["cpu"], result["precision"]), []).append(result)
    return "\n".join(
        f"- {cpu}, ours in {precision}: {plural(len(own), 'shape')}, {_range(one['ratio'] for one in own)} times the "
        f"reference's speed, where the floor allows {_range(map(_ratio_at_floor, own))}."
        for (cpu, precision), own in sorted(measured_in.items(), key=lambda item: -len(item[1]))
    )


def describe_machine(result: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{machine['cpu']}, {machine['cpu_count']} cores; torch {versions['torch']}, torchrec {versions['torchrec']}; "
        f"commit {short_commit(result)}"
    )


def draw_table(results: list[dict[str, Any]]) -> str:
    """A Markdown table, small batches and small tables first."""
    lines = [_COLUMNS, tuple("---" for _ in _COLUMNS), *(_row(result) for result in sorted(results, key=_order))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _order(result: dict[str, Any]) -> tuple[Any, ...]:
    shape = result["bench"]["shape"]
    return (shape["rows"] == "mlperf", shape["optimizer"], shape["ranks"], shape["batch_size"], shape["tables_gib"])


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    shape, sides = result["bench"]["shape"], result["sides"]
    exponent = result["config"]["data"]["zipf_exponent"]
    ids = f"power law, {exponent:g}" if exponent else "uniform"
    tables = sum(sides["ours"]["tables_gib"]) + sum(sides["ours"]["state_gib"])
    ratios = result["ratios"]
    return (
        ids,
        f"{tables:.1f}",
        shape["optimizer"],
        str(shape["ranks"]),
        f"{shape['batch_size']:,}",
        result["precision"],
        f"**{result['ratio']:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{result['share_of_floor']:.0%}",
        f"{_ratio_at_floor(result):.1f}",
        f"{_memory(sides['ours']):.2f}, {_memory(sides['reference']):.2f}",
    )


def _ratio_at_floor(result: dict[str, Any]) -> float:
    """What the ratio would be if our side took no longer than the floor."""
    return result["ratio"] / result["share_of_floor"]


def _range(values: Iterable[float]) -> str:
    values = list(values)
    return f"{min(values):.1f} to {max(values):.1f}"


def _memory(side: dict[str, Any]) -> float:
    """Peak of the rank that took most beside its tables."""
    return max(
        peak - tables - state
        for peak, tables, state in zip(side["peak_rss_gib"], side["tables_gib"], side["state_gib"], strict=True)
    )
