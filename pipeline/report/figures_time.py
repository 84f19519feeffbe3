"""The figures of the time that a run took."""

from collections.abc import Sequence
from functools import partial
from statistics import fmean, median
from typing import TYPE_CHECKING

from pipeline.report.arms import Arm
from pipeline.report.findings import Findings
from pipeline.report.style import (
    Picture,
    draw,
    from_zero,
    legend_below,
    line_style,
    panels,
    plot_curve,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASES = (
    "start",
    "covariance",
    "anchor",
    "baseline",
    "values",
    "attribution",
    "insertion",
    "training",
    "evaluation",
    "general",
)
_ROUND_PHASES = {
    "values and insertion": ("values", "insertion"),
    "values": ("values",),
    "attribution": ("attribution",),
    "insertion": ("insertion",),
    "training": ("training",),
    "evaluation": ("evaluation", "general"),
}


def seconds(arms: Sequence[Arm]) -> Picture | None:
    """Time of each phase; None where none was recorded."""
    recorded = [(n, arm.label, _mean_seconds(arm)) for n, arm in enumerate(arms)]
    phases = phases_of([findings for arm in arms for findings in arm.runs])
    if not phases:
        return None
    longest = max(times.get(phase, 0.0) for _, _, times in recorded for phase in phases)
    unit, divisor = ("minutes", 60.0) if longest >= 600 else ("seconds", 1.0)

    def paint(figure: "Figure") -> None:
        (axes,) = panels(figure, 1, 1)
        height = 0.8 / len(recorded)
        for number, (_, label, times) in enumerate(recorded):
            style = line_style(number)
            places = [
                row + (number - (len(recorded) - 1) / 2) * height for row in range(len(phases))
            ]
            lengths = [times.get(phase, 0.0) / divisor for phase in phases]
            axes.barh(places, lengths, 0.9 * height, label=label, color=style["color"])
            for place, length in zip(places, lengths, strict=True):
                axes.annotate(
                    f"{length:.1f}", (length, place), (3, 0), textcoords="offset points",
                    va="center", fontsize=7,
                )  # fmt: skip
        axes.set_yticks(range(len(phases)), phases)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"wall-clock time, {unit}")
        axes.margins(x=0.1)
        if len(recorded) > 1:
            legend_below(figure, axes)

    alt = "; ".join(
        f"{label}: "
        + ", ".join(f"{phase} {times[phase]:.1f} s" for phase in phases if phase in times)
        for _, label, times in recorded
    )
    height = 0.9 + len(phases) * max(0.3, 0.17 * len(recorded)) + 0.1 * len(recorded)
    several = "; the mean of several seeds" if any(len(arm.runs) > 1 for arm in arms) else ""
    return draw("seconds", f"Wall-clock time of each phase{several}.", alt, paint, height)


def seconds_by_round(arms: Sequence[Arm]) -> Picture | None:
    """How long each round took, by phase; None where that was not recorded."""
    found = {}
    for title, phases in _ROUND_PHASES.items():
        lines = [
            (n, arm.label, arm.curve(partial(_by_round, phases=phases)))
            for n, arm in enumerate(arms)
        ]
        if lines := [line for line in lines if line[2]]:
            found[title] = lines
    if not found:
        return None

    def paint(figure: "Figure") -> None:
        all_axes = panels(figure, len(found), 2)
        for axes, (title, lines) in zip(all_axes, found.items(), strict=True):
            for number, label, curve in lines:
                plot_curve(axes, curve, label, line_style(number))
            axes.set_title(title, loc="left")
            axes.set_xlabel("round, counted from 0")
            axes.set_ylabel("wall-clock time, seconds")
            from_zero(axes)
            whole_numbers(axes.xaxis)
        legend_below(figure, all_axes[0])

    caption = (
        "Wall-clock time of each round. Evaluating all past edits grows with the rounds before,"
        " where it follows no fixed sample; nothing else does."
    )
    alt = "; ".join(
        f"{title}: "
        + ", ".join(f"{label} {curve[0][1]:.1f} s to {curve[-1][1]:.1f} s" for _, label, curve in c)
        for title, c in found.items()
    )
    return draw("seconds-by-round", caption, alt, paint, 0.5 + 2.2 * -(-len(found) // 2))


def growth(findings: Findings) -> dict[str, tuple[int, float, float]]:
    """Phases of a round -> (rounds compared, median seconds at the beginning, at the end).

    Up to ten rounds at either end; round 0, which also warms up, counts for neither.
    """
    found = {}
    for title, phases in _ROUND_PHASES.items():
        times = [seconds for round, seconds in _by_round(findings, phases) if round > 0]
        count = min(10, len(times) // 2)
        if count:
            found[title] = (count, median(times[:count]), median(times[-count:]))
    return found


def phases_of(found: Sequence[Findings]) -> list[str]:
    """The phases of all runs, in the order in which a job goes through them."""
    names = {name for findings in found for name in findings.summary["seconds"]}
    return [name for name in PHASES if name in names] + sorted(names - set(PHASES))


def _by_round(findings: Findings, phases: Sequence[str]) -> list[tuple[float, float]]:
    """Seconds of some phases together, of the rounds that had any of them."""
    found = []
    for entry in findings.round_seconds:
        times = [entry.seconds[phase] for phase in phases if phase in entry.seconds]
        if times:
            found.append((float(entry.round), sum(times)))
    return found


def _mean_seconds(arm: Arm) -> dict[str, float]:
    times = [findings.summary["seconds"] for findings in arm.runs]
    names = dict.fromkeys(name for each in times for name in each)
    return {name: fmean(each.get(name, 0.0) for each in times) for name in names}
