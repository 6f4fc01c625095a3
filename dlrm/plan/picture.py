"""A forecast as a picture: the memory of each rank, and the step's timeline. No torch here."""

import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlrm.config.checks import check_output_file
from dlrm.errors import ConfigError, reason_of
from dlrm.plan.report import PARTS
from dlrm.system.files import write_atomically

_SUFFIXES = (".html", ".svg")
_WIDTH = 860
_COLORS_OF_MEMORY = ("#4c78a8", "#72b7b2", "#f58518", "#9d9da1", "#eeeeee")
_PARTS_OF_STEP = ("lookup", "dense", "communication")
_COLORS_OF_STEP = ("#4c78a8", "#54a24b", "#e45756")
_ROW_HEIGHT = 22
_MOST_RANKS_NAMED = 32


def check_plot(path: str) -> None:
    """Refuses, before the search, a picture that could not be drawn after it.

    Raises:
        ConfigError: naming the flag.
    """
    if Path(path).suffix not in _SUFFIXES:
        raise ConfigError(f"--plot {path}: expected a name that ends in {' or '.join(_SUFFIXES)}.")
    check_output_file("plot", path)
    for package, module in (("altair", "altair"), ("vl-convert-python", "vl_convert")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"--plot: the package {package} is not installed. Install it, or leave the flag out.")


def draw(facts: Mapping[str, Any], path: str, recipe: str | None = None) -> None:
    """Writes the picture, as SVG or as a page that needs no network.

    Args:
        recipe: name of the recipe that was planned, for the title.

    Raises:
        ConfigError: if the file can't be written. It is unchanged then.
    """
    import altair

    # Altair refuses more than 5,000 rows of data by default; 4,096 ranks have 20,480.
    altair.data_transformers.disable_max_rows()
    memory, timeline = _memory_chart(facts), _timeline_chart(facts)
    step = facts["step"]
    title = altair.TitleParams(
        f"{recipe + ': ' if recipe else ''}{facts['tables_gib']:.2f} GiB of tables on {facts['cluster']['name']}",
        subtitle=f"{step['step_time_ms']:.2f} ms a step, {step['samples_per_second']:,.0f} samples/s expected; "
        f"bound by {step['bound_by']}",
        anchor="start",
        offset=24,
    )
    chart = altair.vconcat(memory, timeline, spacing=30).resolve_scale(color="independent").properties(title=title)
    drawn = io.StringIO()
    kind = Path(path).suffix[1:]
    chart.save(drawn, format=kind, **({"inline": True} if kind == "html" else {}))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda file: file.write(drawn.getvalue().encode()))
    except OSError as error:
        raise ConfigError(f"--plot {path}: can't be written ({reason_of(error)}).") from None


def _memory_chart(facts: Mapping[str, Any]) -> Any:
    import altair

    rows = [
        {"rank": number, "part": part, "order": order, "gib": round(max(0.0, rank[part]), 4)}
        for number, rank in enumerate(facts["memory_gib_per_rank"])
        for order, part in enumerate(PARTS)
    ]
    return (
        altair.Chart(altair.Data(values=rows), title="Memory of each rank")
        .mark_bar()
        .encode(
            x=altair.X(
                "rank:O", axis=altair.Axis(labelAngle=0, values=_named_ranks(len(facts["memory_gib_per_rank"])))
            ),
            y=altair.Y("sum(gib):Q", title="GiB"),
            color=altair.Color(
                "part:N", sort=PARTS, title=None, scale=altair.Scale(domain=PARTS, range=_COLORS_OF_MEMORY)
            ),
            order="order:Q",
            tooltip=["rank:O", "part:N", "gib:Q"],
        )
        .properties(width=_WIDTH, height=240)
    )


def _named_ranks(num_ranks: int) -> list[int]:
    """The ranks whose number is shown: round numbers, few enough that they do not touch."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return list(range(0, num_ranks, next(step for step in steps if num_ranks <= step * _MOST_RANKS_NAMED)))


def _timeline_chart(facts: Mapping[str, Any]) -> Any:
    import altair

    total = facts["step"]["step_time_ms"]
    digits = 2 if total >= 1 else 3
    rows = [
        {
            **span,
            "time_ms": round(span["end_ms"] - span["start_ms"], 4),
            "label": f"{span['name']}, {span['end_ms'] - span['start_ms']:.{digits}f} ms",
        }
        for span in facts["step"]["timeline"]
    ]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    return (
        altair.Chart(altair.Data(values=rows), title="Timeline of a step")
        .mark_bar()
        .encode(
            x=altair.X(
                "start_ms:Q",
                title="ms",
                scale=altair.Scale(domain=[0, total], nice=False),
                axis=altair.Axis(tickCount=8),
            ),
            x2="end_ms:Q",
            y=altair.Y("label:N", sort=labels, title=None, axis=altair.Axis(labelLimit=0, grid=True)),
            color=altair.Color(
                "part:N",
                sort=_PARTS_OF_STEP,
                title=None,
                scale=altair.Scale(domain=_PARTS_OF_STEP, range=_COLORS_OF_STEP),
            ),
            tooltip=["name:N", "time_ms:Q", "start_ms:Q", "end_ms:Q", "bound_by:N"],
        )
        .properties(width=_WIDTH, height=_ROW_HEIGHT * len(labels))
    )
