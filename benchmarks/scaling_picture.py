"""The picture of benchmarks/scaling.py: samples/s, efficiency and exposed communication against ranks, weak scaling
beside strong. A function of the result alone, to the byte."""

import math
from collections.abc import Mapping
from typing import Any

import altair
import vl_convert

_WIDTH = 400
_COLORS = {"a100_40gb": "#4c78a8", "h100": "#e45756"}
_DIGITS = 4
"""Of a number in the picture. More would only differ between machines."""


def draw(result: Mapping[str, Any]) -> str:
    """The picture as SVG."""
    return vl_convert.vegalite_to_svg(to_chart(result).to_dict())


def to_chart(result: Mapping[str, Any]) -> Any:
    """The picture as an Altair chart."""
    weak, strong = result["weak_batch_size"], result["strong_global_batch_size"]
    titles = {
        "weak": f"Weak scaling: {weak:,} samples a rank",
        "strong": f"Strong scaling: {strong:,} samples of all ranks",
    }
    columns = [
        altair.vconcat(
            _rates(result, mode, title), _shares(result, mode, "efficiency"), _shares(result, mode, "exposed")
        )
        for mode, title in titles.items()
    ]
    title = altair.TitleParams(
        f"Expected samples/s of {result['recipe']} ({result['tables_gib']:.0f} GiB of tables), hosts of 8 GPUs",
        subtitle=[
            "By the cost model of dlrm plan, with 70 % of the data sheets' peak numbers, 30 us a collective and 1 us a "
            "message. Nothing here was measured.",
            "Lines: each table is split by columns over 16 ranks, by a rule and not by TorchRec's planner. "
            "Crosses: the planner's own plan, up to where it is quick.",
            "Dashed: ideal, in proportion to the ranks, from the smallest cluster that holds the model.",
        ],
        anchor="start",
        offset=14,
    )
    chart = altair.hconcat(*columns, spacing=40).properties(title=title, background="white")
    return chart.configure_title(subtitleColor="#555").configure_axis(gridColor="#e8e8e8")


def _points(result: Mapping[str, Any], mode: str) -> list[dict[str, Any]]:
    """Those there is something to expect of, with the ideal rate."""
    points = []
    for point in result["points"]:
        if point["mode"] == mode and not point["error"]:
            rate, efficiency = point["samples_per_second"], point["efficiency"]
            numbers = {
                "rate": rate,
                "ideal": rate / efficiency,
                "efficiency": efficiency,
                "exposed": point["exposed_communication"],
            }
            rounded = {name: float(f"{number:.{_DIGITS}g}") for name, number in numbers.items()}
            points.append({**{name: point[name] for name in ("kind", "ranks", "placement")}, **rounded})
    return points


def _rates(result: Mapping[str, Any], mode: str, title: str) -> Any:
    points = _points(result, mode)
    ruled = _chart([point for point in points if point["placement"] == "rule"])
    # The same on both sides, so that they can be compared.
    numbers = [
        point[name] for side in ("weak", "strong") for point in _points(result, side) for name in ("rate", "ideal")
    ]
    decades = [
        10**power for power in range(math.floor(math.log10(min(numbers))), math.floor(math.log10(max(numbers))) + 1)
    ]
    y = altair.Y(
        "rate:Q",
        title="samples/s",
        scale=altair.Scale(type="log", domain=[decades[0], 1.5 * max(numbers)], nice=False),
        axis=altair.Axis(values=decades, labelExpr="format(datum.value / 1e6, ',') + ' million'"),
    )
    ideal = ruled.mark_line(strokeDash=[5, 4], strokeWidth=1).encode(x=_x(), y="ideal:Q", color=_color())
    lines = ruled.mark_line(point=altair.OverlayMarkDef(size=36)).encode(x=_x(), y=y, color=_color())
    return altair.layer(ideal, lines, _crosses(points, "rate")).properties(width=_WIDTH, height=250, title=title)


def _shares(result: Mapping[str, Any], mode: str, name: str) -> Any:
    titles = {"efficiency": ["efficiency"], "exposed": ["exposed", "communication"]}
    points = _points(result, mode)
    y = altair.Y(f"{name}:Q", title=titles[name], scale=altair.Scale(domain=[0, 1]), axis=altair.Axis(format="%"))
    ruled = _chart([point for point in points if point["placement"] == "rule"])
    lines = ruled.mark_line(point=altair.OverlayMarkDef(size=36)).encode(x=_x(), y=y, color=_color())
    return altair.layer(lines, _crosses(points, name)).properties(width=_WIDTH, height=110)


def _crosses(points: list[dict[str, Any]], name: str) -> Any:
    planned = _chart([point for point in points if point["placement"] == "planner"])
    return planned.mark_point(shape="cross", size=50, filled=True, opacity=1).encode(
        x=_x(), y=f"{name}:Q", color=_color()
    )


def _chart(points: list[dict[str, Any]]) -> Any:
    return altair.Chart(altair.Data(values=points))


def _x() -> Any:
    ticks = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    return altair.X(
        "ranks:Q",
        title="ranks",
        scale=altair.Scale(type="log", base=2, domain=[ticks[0], ticks[-1]], nice=False, padding=8),
        axis=altair.Axis(values=ticks, format=",d", labelOverlap=False, labelFontSize=9),
    )


def _color() -> Any:
    return altair.Color("kind:N", title=None, scale=altair.Scale(domain=list(_COLORS), range=list(_COLORS.values())))
