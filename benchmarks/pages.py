"""Draws every page of figures from the committed results, byte for byte the same from the same files.

    python -m benchmarks.pages            # writes results.md, design/profile.md, planted_curve.md, and their pictures
    python -m benchmarks.pages --check    # exit code 1 where one of them is not what the results say

Nothing is measured here. What measures is named beside each figure.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from benchmarks import planted, scaling_picture, speed_table
from benchmarks.figures import FIGURES
from benchmarks.flags import Parser, run_script
from dlrm.bench.harness.provenance import read_result, short_commit
from dlrm.config.recipes import CRITEO_1T_TRAINING_ROWS
from dlrm.errors import DatasetError
from dlrm.system.files import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = Path("benchmarks/results")
TEMPLATE = Path("benchmarks/results.md.jinja")
PROFILE_TEMPLATE = Path("benchmarks/profile.md.jinja")

DRAWN_OTHERWISE = frozenset({"plans.json", "calibration.json", "scaling.json", "step_profile.json"})
"""Results of which the template makes more than one line."""

Result = dict[str, Any]


@dataclass(frozen=True)
class SpecRow:
    """A row of the public example's results table."""

    name: str
    recipe: str
    gib: float
    local_batch: int
    val_auroc: float
    test_auroc: float
    samples_per_second: float
    epoch: str


SPEC_ROWS = (
    SpecRow("MLPerf", "spec_mlperf_a100x8", 97.36, 8192, 0.7737, 0.7685, 5_497_159.68, "12m43s"),
    SpecRow("MLPerfx2", "spec_mlperf_x2_a100x16", 174.03, 4096, 0.7761, 0.7706, 2_028_339.2, "34m27s"),
    SpecRow("Full Size", "spec_full_size_a100x80", 420.94, 819, 0.7841, 0.7787, 459_950.4, "2h32m03s"),
)


def main() -> int:
    """Writes the pages, or compares them."""
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    arguments = parser.parse_args()
    pages = draw_pages(ROOT)
    stale = [name for name, page in pages.items() if not (ROOT / name).exists() or (ROOT / name).read_bytes() != page]
    if arguments.check:
        wrong = [f"{name}: not what the results say. Run `python -m benchmarks.pages`." for name in stale]
        print("\n".join(wrong or [f"{len(pages)} pages and pictures are what the results say."]))
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(ROOT / name, lambda file, page=pages[name]: file.write(page))
    print(f"{len(pages)} pages and pictures, {len(stale)} of them new: {', '.join(stale) or '-'}")
    return 0


def draw_pages(root: Path) -> dict[str, bytes]:
    """All that is drawn, by its name in the repository.

    Raises:
        DatasetError: if a result is missing or damaged, naming it.
    """
    results = Results(root)
    pages = {"docs/results.md": draw_results(results, (root / TEMPLATE).read_text())}
    with _drawing("step_profile.json"):
        template = _environment().from_string((root / PROFILE_TEMPLATE).read_text())
        pages["docs/design/profile.md"] = template.render(profile=results.read("step_profile.json"))
    with _drawing("planted_curve.json"):
        curve = results.read("planted_curve.json")
        pages["docs/planted_curve.md"] = planted.draw_page(curve)
        pages[f"docs/{planted.PICTURE}"] = planted.draw_picture(curve)
    with _drawing("scaling.json"):
        pages["docs/pictures/scaling.svg"] = scaling_picture.draw(results.read("scaling.json"))
    return {name: page.encode() for name, page in pages.items()}


@contextmanager
def _drawing(*names: str) -> Iterator[None]:
    """Names the results where what is drawn of them is of another kind than it must be."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, jinja2.TemplateError) as error:
        files = ", ".join(str(RESULTS / name) for name in names)
        raise DatasetError(f"{files}: can't be drawn ({type(error).__name__}: {error}). Measure it again.") from None


class Results:
    """The committed results."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str) -> Result:
        """One of them.

        Raises:
            DatasetError: if it is not there, or damaged.
        """
        return read_result(self._root / RESULTS / name)

    def folder(self, name: str) -> list[Result]:
        """All in a folder, by name.

        Raises:
            DatasetError: if one is damaged.
        """
        return [read_result(path) for path in sorted((self._root / RESULTS / name).glob("*.json"))]


def draw_results(results: Results, template: str) -> str:
    """The page of results."""
    with _drawing("plans.json"):
        planned = results.read("plans.json")
        plans = {plan["recipe"]: plan for plan in planned["plans"] if not plan["flags"]}
        rows = [_compare(row, plans[row.recipe]) for row in SPEC_ROWS]
        v1_rate = plans["mlperf_v1"]["facts"]["step"]["samples_per_second"]
        v1_minutes = CRITEO_1T_TRAINING_ROWS / v1_rate / 60
    train = results.folder("train")
    with _drawing("train/*.json"):
        speed, speed_summary = speed_table.draw_tables(train), speed_table.summarize(train)
    with _drawing("*.json"):
        machines = _machines([*(results.read(figure.file) for figure in FIGURES), *train])
    with _drawing("plans.json", "calibration.json", "scaling.json"):
        return (
            _environment()
            .from_string(template)
            .render(
                rows=rows,
                otherwise={plan["recipe"]: plan for plan in planned["plans"] if plan["flags"]},
                train_rows=CRITEO_1T_TRAINING_ROWS,
                v1_minutes=v1_minutes,
                plans=planned,
                figures=_table(("what", "figure", "machine", "command", "commit"), _run_here(results)),
                speed=speed,
                speed_summary=speed_summary,
                calibration=results.read("calibration.json"),
                scaling=results.read("scaling.json"),
                machines=machines,
            )
        )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short_commit"] = short_commit
    return environment


def _compare(row: SpecRow, plan: Result) -> dict[str, Any]:
    """A row's figures beside what is expected of its cluster."""
    facts = plan["facts"]
    step, ranks = facts["step"], facts["cluster"]["world_size"]
    if facts["batch_size"] != row.local_batch:
        raise DatasetError(f"{row.recipe}: a local batch of {facts['batch_size']}, expected {row.local_batch}.")
    samples = row.local_batch * ranks
    return {
        "spec": row,
        "plan": plan,
        "gib": f"{facts['tables_gib']:.2f}",
        "ranks": ranks,
        "samples": samples,
        "expected": step["samples_per_second"],
        "epoch": _clock(CRITEO_1T_TRAINING_ROWS / step["samples_per_second"]),
        "epoch_minutes": CRITEO_1T_TRAINING_ROWS / step["samples_per_second"] / 60,
        "over": step["samples_per_second"] / row.samples_per_second,
        "step_ms": step["step_time_ms"],
        "spec_step_ms": 1e3 * samples / row.samples_per_second,
        "lookup_ms": step["lookup_time_ms"],
        "dense_ms": step["dense_time_ms"],
        "exposed_ms": step["exposed_communication_time_ms"],
        "bound_by": step["bound_by"],
        "shardings": ", ".join(sorted({table["sharding"] for table in facts["tables"]})),
        "largest_gib": max(rank["weights"] for rank in facts["memory_gib_per_rank"]),
    }


def _clock(seconds: float) -> str:
    """As the spec writes it: 12m43s, 2h32m03s."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}h{minute:02d}m{second:02d}s" if hours else f"{minute}m{second:02d}s"


def _run_here(results: Results) -> Iterable[Sequence[str]]:
    for figure in FIGURES:
        result = results.read(figure.file)
        with _drawing(figure.file):
            link = f"[{short_commit(result)}](../{RESULTS / figure.file})"
            what, cpu = figure.what.format_map(result), result["machine"]["cpu"]
            line = what, figure.draw(result), cpu, f"`{result['command']}`", link
        yield line


def _machines(results: Iterable[Result]) -> str:
    """Every machine that measured, once."""
    return "; ".join(
        dict.fromkeys(f"{one['machine']['cpu']}, {one['machine']['cpu_count']} hardware threads" for one in results)
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    run_script(main)
