"""The figures of scores: before and after, against rounds, against the edit's age."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.report.arms import Arm
from pipeline.report.style import (
    Curve,
    Picture,
    draw,
    error_bar,
    legend_below,
    line_style,
    panels,
    plot_curve,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.report.forgetting import Entry, Forgetting

SCORE_NAMES = {
    "ES": "rewrite (ES)",
    "PS": "paraphrase (PS)",
    "NS": "neighbourhood (NS)",
    "S": "harmonic mean (S)",
}
_PER_CENT = "per cent"
_AXES = {"round": "round, counted from 0", "age": "age of the edit, rounds"}


def scores(arms: Sequence[Arm]) -> Picture | None:
    """Every score before and after, with its interval; None where nothing was scored."""
    shown = [(arm, last) for arm in arms if (last := arm.last) is not None]
    if not shown:
        return None

    def paint(figure: "Figure") -> None:
        (axes,) = panels(figure, 1, 1)
        lines = [(name, n) for name in reversed(SCORE_NAMES) for n in reversed(range(len(shown)))]
        for height, (name, number) in enumerate(lines):
            arm, last = shown[number]
            style = line_style(number) | {"linestyle": "none"}
            if arm.baseline is not None:
                hollow = style | {"markerfacecolor": "white"}
                _dot(axes, arm.baseline[name], height, f"{arm.label}, unedited", hollow)
            _dot(axes, last[name], height, f"{arm.label}, edited", style)
        places = [len(shown) * i + (len(shown) - 1) / 2 for i in range(len(SCORE_NAMES))]
        axes.set_yticks(places, [SCORE_NAMES[name] for name in reversed(SCORE_NAMES)])
        axes.set_xlim(-2, 102)
        axes.set_ylim(-0.6, len(lines) - 0.4)
        axes.set_xlabel("success, per cent of probes, mean over edits")
        axes.grid(axis="y", visible=False)
        _legend_once(figure, axes)

    alt = "; ".join(
        f"{arm.label}: " + ", ".join(_said(name, arm.baseline, last) for name in SCORE_NAMES)
        for arm, last in shown
    )
    caption = (
        f"Success of each kind of probe and their harmonic mean, with {_spread(arms)}; hollow: the"
        " unedited model, filled: after the last evaluated round."
    )
    return draw("scores", caption, alt, paint, 1.4 + 0.22 * 4 * len(shown))


def against_rounds(arms: Sequence[Arm]) -> Picture | None:
    """Scores of all edits so far after each evaluated round; None without a study.

    With one arm also those of each round's own edits, which are a figure of their own with several.
    """
    so_far = _Lines("all edits so far", lambda f: f.so_far)
    own = _Lines("that round's edits", lambda f: f.current, is_hollow=True)
    what, lines = "of all scored edits so far", [so_far]
    if len(_studies(arms)) == 1:
        what, lines = f"{what} (filled) and of that round's own (hollow)", [so_far, own]
    caption = f"Success after each evaluated round, {what}."
    return _curves(arms, "forgetting-by-round", caption, "round", lines)


def own_by_round(arms: Sequence[Arm]) -> Picture | None:
    """Scores of each round's own edits, right after it; None without several studies."""
    if len(_studies(arms)) < 2:
        return None
    caption = "Success of each evaluated round's own edits, right after it."
    lines = [_Lines("", lambda f: f.current)]
    return _curves(arms, "own-edits-by-round", caption, "round", lines)


def against_age(arms: Sequence[Arm]) -> Picture | None:
    """Scores by how long ago an edit was made; None without a study."""
    caption = (
        "Success against the age of an edit: how many rounds after its own it was scored (0: right"
        " after it)."
    )
    lines = [_Lines("", lambda f: f.by_age)]
    return _curves(arms, "forgetting-by-age", caption, "age", lines)


@dataclass(frozen=True)
class _Lines:
    """A line an arm: which of its entries, and how they are told from the arm's other lines."""

    what: str
    entries: "Callable[[Forgetting], list[Entry]]"
    is_hollow: bool = False

    def of(self, arm: Arm) -> "list[Entry]":
        return arm.entries(lambda f: self.entries(f.forgetting) if f.forgetting else [])


def _curves(
    arms: Sequence[Arm], name: str, caption: str, x: str, lines: Sequence[_Lines]
) -> Picture | None:
    """A panel a score, the first lines with bands; None without a study."""
    studies = _studies(arms)
    if not studies:
        return None

    def paint(figure: "Figure") -> None:
        all_axes = panels(figure, 4, 2, sharex=True)
        for axes, score in zip(all_axes, SCORE_NAMES, strict=True):
            for number, arm in studies:
                for line in lines:
                    style = line_style(number)
                    if line.is_hollow:
                        style |= {"markerfacecolor": "white", "linewidth": 0.9}
                    label = f"{arm.label}: {line.what}" if len(lines) > 1 else arm.label
                    curve = _points(line.of(arm), score)
                    plot_curve(axes, curve, label, style, banded=not line.is_hollow)
            _score_axes(axes, score)
        for axes in all_axes[2:]:
            axes.set_xlabel(_AXES[x])
        legend_below(figure, all_axes[0], 3 if len(lines) == 1 else 2)

    alt = _curves_said(studies, lines[0].of, x)
    caption = f"{caption} Bands: {_spread(arms)}."
    return draw(name, caption, alt, paint, 4.5 + 0.1 * len(lines) * len(studies))


def _studies(arms: Sequence[Arm]) -> list[tuple[int, Arm]]:
    """The arms that are studies, with their numbers, which decide how their lines look."""
    return [
        (number, arm)
        for number, arm in enumerate(arms)
        if all(run.forgetting is not None for run in arm.runs)
    ]


def _spread(arms: Sequence[Arm]) -> str:
    kinds = {len(arm.runs) > 1 for arm in arms}
    if kinds == {True}:
        return "the least and the greatest of the seeds around their mean"
    plain = "95 % intervals over edits"
    return plain if kinds == {False} else f"{plain}, or the least and the greatest of several seeds"


def _score_axes(axes: "Axes", name: str) -> None:
    axes.set_title(SCORE_NAMES[name], loc="left")
    axes.set_ylim(-3, 103)
    axes.set_ylabel(_PER_CENT)
    whole_numbers(axes.xaxis)


def _points(entries: "list[Entry]", name: str) -> Curve:
    known = [(entry["round"], entry[name]) for entry in entries if entry[name] is not None]
    return [(round, score["score"], score["low"], score["high"]) for round, score in known]


def _dot(
    axes: "Axes", score: dict[str, float] | None, height: float, label: str, style: dict[str, Any]
) -> None:
    if score is None:
        return
    bars = error_bar(score["score"], score["low"], score["high"])
    axes.errorbar(
        [score["score"]], [height], xerr=bars, label=label, capsize=3, elinewidth=1.2, **style
    )


def _legend_once(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    figure.legend(first.values(), first.keys(), loc="outside lower center", ncols=2)


def _said(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    numbers = [_percent(entry[name]) for entry in (before, after) if entry is not None]
    return f"{SCORE_NAMES[name]} " + " to ".join(numbers)


def _percent(score: dict[str, float] | None) -> str:
    return "not defined" if score is None else f"{score['score']:.1f} %"


def _curves_said(
    studies: Sequence[tuple[int, Arm]], entries_of: "Callable[[Arm], list[Entry]]", what: str
) -> str:
    """First and last point of every curve."""
    said = []
    for _, arm in studies:
        if entries := entries_of(arm):
            first, last = entries[0], entries[-1]
            scores = ", ".join(_said(name, first, last) for name in SCORE_NAMES)
            said.append(f"{arm.label}, from {what} {first['round']} to {last['round']}: {scores}")
    return "; ".join(said)
