"""The figures of a survey: single edits by editor, and curves over batches and sequences."""

from typing import TYPE_CHECKING

from pipeline.report.style import (
    GREY,
    SKY,
    Picture,
    draw,
    error_bar,
    legend_below,
    line_style,
    panels,
)
from pipeline.report.surveyed import SETTINGS, SHOWN, Group, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COSTS = {"seconds": ("seconds an edit", 1.0), "memory": ("MB beyond the model", 1e-6)}
_FINEST_STEP = 0.03


def single(group: Group, number: int) -> Picture | None:
    """Bars of every measure of single edits by editor; None where there are none."""
    points = [(editor, found[0]) for _, editor, found in group.of("single")]
    shown = [name for name in SHOWN if any(_has(point, name) for _, point in points)]
    if not shown:
        return None

    def paint(figure: "Figure") -> None:
        all_axes = panels(figure, len(shown), len(shown), sharey=True)
        for axes, name in zip(all_axes, shown, strict=True):
            for height, (_, point) in enumerate(points):
                _bar(axes, point, name, height)
            axes.set_xlim(0, 104)
            axes.set_title(SHOWN[name], loc="left")
            axes.set_xlabel("per cent")
            axes.grid(axis="y", visible=False)
            axes.set_axisbelow(True)
        _name_editors(all_axes[0], [editor for editor, _ in points])

    caption = (
        f"{group.title}: {SETTINGS['single'].lower()}, with 95 % intervals over edits."
        " Portability is left out where the data has no probes of it."
    )
    alt = "; ".join(f"{editor}: {_said(point)}" for editor, point in points)
    return draw(f"survey-{number}-single", caption, alt, paint, 1.0 + 0.24 * len(points))


def costs(group: Group, number: int) -> Picture | None:
    """Seconds and memory of single edits by editor; None where none were measured."""
    points = [(editor, found[0]) for _, editor, found in group.of("single")]
    shown = [name for name in _COSTS if any(_has(point, name) for _, point in points)]
    if not shown:
        return None

    def paint(figure: "Figure") -> None:
        all_axes = panels(figure, len(shown), len(shown), sharey=True)
        for axes, name in zip(all_axes, shown, strict=True):
            title, scale = _COSTS[name]
            known = [
                (height, point.measures[name]["value"] * scale)
                for height, (_, point) in enumerate(points)
                if _has(point, name)
            ]
            heights, values = zip(*known, strict=True)
            axes.barh(heights, values, height=0.6, color=SKY)
            for height, value in known:
                axes.annotate(
                    f"{value:.2g}" if value < 10 else f"{value:.0f}",
                    (value, height),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
            for height, (_, point) in enumerate(points):
                if not _has(point, name):
                    _note(axes, point, name, height)
            axes.set_xlim(0, 1.2 * max(*values, 1e-9))
            axes.set_title(title, loc="left")
            axes.grid(axis="y", visible=False)
            axes.set_axisbelow(True)
        _name_editors(all_axes[0], [editor for editor, _ in points])

    caption = (
        f"{group.title}: what a single edit takes. Seconds are those of all workers and reducers"
        " while they edit; memory is the peak of a worker and a reducer beyond the loaded model."
    )
    alt = "; ".join(
        f"{editor}: "
        + ", ".join(
            f"{point.measures[name]['value'] * _COSTS[name][1]:.3g} {_COSTS[name][0]}"
            for name in shown
            if _has(point, name)
        )
        for editor, point in points
    )
    return draw(f"survey-{number}-costs", caption, alt, paint, 1.0 + 0.24 * len(points))


def curves(group: Group, setting: str, number: int) -> Picture | None:
    """A panel a measure, a line an editor, against the number of edits; None without any."""
    lines = [
        (place, editor, [point for point in found if point.status == "done"])
        for place, editor, found in group.of(setting)
    ]
    lines = [line for line in lines if line[2]]
    done = [point for _, _, points in lines for point in points]
    shown = [name for name in SHOWN if any(_has(point, name) for point in done)]
    if not shown:
        return None
    sizes = sorted({point.edits for point in done})
    columns = 2 if len(shown) == 4 else len(shown)

    def paint(figure: "Figure") -> None:
        all_axes = panels(figure, len(shown), columns, sharex=True)
        for axes, name in zip(all_axes, shown, strict=True):
            for order, (place, editor, points) in enumerate(lines):
                shift = (1 + _FINEST_STEP) ** (2 * order - len(lines) + 1)
                _line(axes, [p for p in points if _has(p, name)], name, editor, place, shift)
            axes.set_title(SHOWN[name], loc="left")
            axes.set_ylim(-3, 103)
            _edits_axis(axes, sizes)
        for axes in all_axes[::columns]:
            axes.set_ylabel("per cent")
        for axes in all_axes[-columns:]:
            axes.set_xlabel("edits in the batch" if setting == "batch" else "edits made so far")
        legend_below(figure, all_axes[0], 4)

    what = "of each batch" if setting == "batch" else "of all edits so far"
    caption = (
        f"{group.title}: {SETTINGS[setting].lower()}, means {what}, with 95 % intervals over edits."
        " Points are moved sideways a little, so that they do not cover one another."
    )
    alt = "; ".join(
        f"{editor}, {points[0].edits} to {points[-1].edits} edits: {_said(points[0])} to"
        f" {_said(points[-1])}"
        for _, editor, points in lines
    )
    rows = -(-len(shown) // columns)
    height = 0.9 + 2.0 * rows + 0.17 * -(-len(lines) // 4)
    return draw(f"survey-{number}-{setting}", caption, alt, paint, height)


def _line(
    axes: "Axes", points: list[Point], name: str, label: str, place: int, shift: float
) -> None:
    if not points:
        return
    rows = [point.measures[name] for point in points]
    bars = [error_bar(row["value"], row["low"], row["high"]) for row in rows]
    style = line_style(place)
    axes.errorbar(
        [point.edits * shift for point in points],
        [row["value"] for row in rows],
        yerr=[[below for (below,), _ in bars], [above for _, (above,) in bars]],
        label=label,
        elinewidth=0.7,
        ecolor=(style["color"], 0.45),
        **style,
    )


def _edits_axis(axes: "Axes", sizes: list[int]) -> None:
    """A logarithmic axis, ticked at the sizes."""
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0.6 * sizes[0], 1.7 * sizes[-1])


def _bar(axes: "Axes", point: Point, name: str, height: int) -> None:
    if not _has(point, name):
        _note(axes, point, name, height)
        return
    row = point.measures[name]
    spread = error_bar(row["value"], row["low"], row["high"])
    axes.barh(height, row["value"], height=0.6, color=SKY)
    axes.errorbar(
        [row["value"]], [height], xerr=spread, fmt="none", ecolor="black", capsize=2, elinewidth=0.9
    )


def _note(axes: "Axes", point: Point, name: str, height: int) -> None:
    """Say in the place of a bar why there is none."""
    said = {"impossible": "cannot", "failed": "failed"}.get(point.status)
    row = point.measures.get(name)
    text = said or ("" if row is None else row["reason"]) or "not measured"
    axes.annotate(
        text,
        (0, height),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=GREY,
    )


def _name_editors(axes: "Axes", editors: list[str]) -> None:
    axes.set_yticks(range(len(editors)), editors)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(editors) - 0.4, -0.6)


def _has(point: Point, name: str) -> bool:
    row = point.measures.get(name)
    return row is not None and row["value"] is not None


def _said(point: Point) -> str:
    if point.status != "done":
        return point.status
    known = [name for name in SHOWN if _has(point, name)]
    return ", ".join(f"{SHOWN[name]} {point.measures[name]['value']:.1f} %" for name in known)
