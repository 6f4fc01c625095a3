"""Draws the table of training speed.

    python -m benchmarks.speed_table benchmarks/results/train --output docs/results/speed.md

Its rows are the JSON files that benchmarks/train_matrix.sh writes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dlrm.artifacts import write_atomically
from dlrm.errors import DatasetError

_HEAD = """# Training speed against plain TorchRec

Written by `python -m benchmarks.speed_table`; do not edit. Each row is a call of `dlrm bench train`
(`benchmarks/train_matrix.sh` has them all): both sides in turn, on the same machine. Ratio: our samples/s over the
reference's, median of the rounds (lowest to highest). Floor: our speed as a share of what matrix rate and memory
bandwidth, measured in the same call, allow at most ([floor](../design/floor.md)). Memory: peak RSS of the largest rank
less its tables and optimizer state, ours and the reference's.
"""
_COLUMNS = ("ids", "tables, GiB", "optimizer", "ranks", "batch", "ours in", "ratio", "floor", "memory, GiB")


def main() -> None:
    """Reads a folder of results and writes the page, or prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of JSON files")
    parser.add_argument("--output", type=Path, help="page to write (default: print it)")
    arguments = parser.parse_args()
    page = draw_page([json.loads(path.read_text()) for path in sorted(arguments.folder.glob("*.json"))])
    if arguments.output is None:
        print(page, end="")
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, lambda file: file.write(page.encode()))
    print(f"{arguments.output} written")


def draw_page(results: list[dict[str, Any]]) -> str:
    """The whole page: a table for each machine.

    Raises:
        DatasetError: if there is no result to draw.
    """
    results = [result for result in results if result.get("case") == "train"]
    if not results:
        raise DatasetError("no results of `dlrm bench train`. Run benchmarks/train_matrix.sh first.")
    machines = {describe_machine(result): None for result in results}
    parts = [_HEAD]
    for machine in machines:
        parts.append(f"{machine}\n\n{draw_table([r for r in results if describe_machine(r) == machine])}")
    return "\n".join(parts)


def describe_machine(result: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{machine['cpu']}, {machine['cpu_count']} cores; torch {versions['torch']}, torchrec {versions['torchrec']}; "
        f"commit {result['commit'][:12]}"
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
        f"{_memory(sides['ours']):.2f}, {_memory(sides['reference']):.2f}",
    )


def _memory(side: dict[str, Any]) -> float:
    """Peak of the rank that took most beside its tables."""
    return max(
        peak - tables - state
        for peak, tables, state in zip(side["peak_rss_gib"], side["tables_gib"], side["state_gib"], strict=True)
    )


if __name__ == "__main__":
    main()
