"""Figures and tables of a causal trace: averages by layer, heat maps of averages and of facts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.printable import one_line
from pipeline.report.style import Picture, draw, legend_below, line_style, panels, whole_numbers
from pipeline.report.tables import Table
from pipeline.report.trace_summary import TracedEffect, TraceSummary, effect_text
from pipeline.results.reading import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KIND_NAMES = {
    "state": "block output",
    "mlp": "window of MLPs",
    "attention": "window of attentions",
    "severed_mlp": "block output, later MLPs cut off",
    "severed_attention": "block output, later attentions cut off",
}
_CLASS_NAMES = {
    "before": "before the subject",
    "first_subject": "first subject token",
    "middle_subject": "middle subject tokens",
    "last_subject": "last subject token",
    "first_after": "first token after",
    "further": "further tokens",
    "last": "last token",
}
_FACTS_SHOWN = 2
_LONGEST_TOKEN = 16

Floats = NDArray[np.float64]


def averages(found: TraceSummary) -> Picture | None:
    """Heat maps of the average indirect effect by token class and layer; None without facts."""
    by_kind = _by_kind(found)
    if not by_kind:
        return None

    def paint(figure: "Figure") -> None:
        all_axes = panels(figure, len(by_kind), 2)
        for axes, (kind, effects) in zip(all_axes, by_kind.items(), strict=True):
            values = np.array([effect.means for effect in effects])
            names = [_CLASS_NAMES.get(e.token_class, e.token_class) for e in effects]
            _heat(figure, axes, values, names, low=0.0)
            axes.set_title(_KIND_NAMES.get(kind, kind), loc="left")

    caption = (
        f"Average indirect effect over {found.trace.facts} facts: how much of the answer's"
        " probability comes back when this is restored at these tokens."
    )
    height = 0.4 + 2.3 * -(-len(by_kind) // 2)
    return draw("trace-averages", caption, _peaks_said(found), paint, height)


def by_layer(found: TraceSummary) -> Picture | None:
    """Average indirect effects at the last subject token and the last token; None without facts."""
    sites = [site for site in ("last_subject", "last") if _at(found, site)]
    if not sites:
        return None

    def paint(figure: "Figure") -> None:
        all_axes = panels(figure, len(sites), 2)
        for axes, site in zip(all_axes, sites, strict=True):
            for number, effect in enumerate(_at(found, site)):
                layers = np.arange(len(effect.means))
                means = np.array(effect.means)
                margins = np.array([0.0 if m is None else m for m in effect.margins])
                style = line_style(number)
                name = _KIND_NAMES.get(effect.kind, effect.kind)
                every = max(1, len(layers) // 12)
                axes.plot(layers, means, label=name, markevery=every, **style)
                bounds = (means - margins, means + margins)
                axes.fill_between(layers, *bounds, color=style["color"], alpha=0.15, linewidth=0)
            axes.set_title(_CLASS_NAMES[site], loc="left")
            axes.set_xlabel("layer, counted from 0")
            axes.set_ylabel("average indirect effect")
            whole_numbers(axes.xaxis)
        legend_below(figure, all_axes[0])

    caption = "Average indirect effects by layer, with 95 % intervals over facts."
    return draw("trace-layers", caption, _peaks_said(found), paint, 3.3)


def facts(run: Run) -> list[Picture]:
    """Heat maps of the facts that lost most probability, each token a row."""
    table = run.trace()
    if not table.num_rows:
        return []
    totals = table.group_by("case_id").aggregate([("clean", "max"), ("corrupted", "max")])
    lost = totals["clean_max"].to_numpy() - totals["corrupted_max"].to_numpy()
    cases = totals["case_id"].to_pylist()
    order = sorted(range(len(cases)), key=lambda i: (-lost[i], cases[i]))[:_FACTS_SHOWN]
    return [
        _fact(number, cases[i], table.filter(pc.equal(table["case_id"], cases[i])))
        for number, i in enumerate(order)
    ]


def effects_table(found: TraceSummary) -> Table | None:
    """The largest average effect of each kind and token class; None without facts."""
    rows = []
    for effect in found.trace.effects:
        peak = int(np.argmax(effect.means))
        rows.append(
            (
                _KIND_NAMES.get(effect.kind, effect.kind),
                _CLASS_NAMES.get(effect.token_class, effect.token_class),
                str(effect.facts),
                str(peak),
                effect_text(effect, peak),
            )
        )
    if not rows:
        return None
    head = ("restored", "token", "facts", "layer", "effect")
    caption = "Average indirect effects at their largest, with 95 % intervals over facts"
    return Table(caption, head, rows, frozenset({2, 3, 4}))


def requests_table(found: TraceSummary) -> Table:
    """What became of the requests, and how likely their answers were."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}"

    numbers = (shown(found.trace.clean), shown(found.trace.corrupted))
    head = (*found.requests, "mean probability, clean", "corrupted")
    row = (*(str(count) for count in found.requests.values()), *numbers)
    return Table("Requests by status", head, [row], frozenset(range(1, len(head))))


def _fact(number: int, case: str, table: Any) -> Picture:
    columns = {name: table[name].to_pylist() for name in table.column_names}
    kinds = list(dict.fromkeys(columns["kind"]))[:3]
    tokens, layers = 1 + max(columns["token"]), 1 + max(columns["layer"])
    maps = {kind: np.full((tokens, layers), np.nan) for kind in kinds}
    names = [""] * tokens
    for kind, token, layer, restored, text, what in zip(
        *(columns[n] for n in ("kind", "token", "layer", "restored", "token_text", "token_class")),
        strict=True,
    ):
        star = "*" if what.endswith("subject") else ""
        names[token] = one_line(text.strip() or repr(text), _LONGEST_TOKEN) + star
        if kind in maps:
            maps[kind][token, layer] = restored
    clean, corrupted = columns["clean"][0], columns["corrupted"][0]

    def paint(figure: "Figure") -> None:
        all_axes = panels(figure, len(kinds), len(kinds), sharey=True)
        for axes, kind in zip(all_axes, kinds, strict=True):
            _heat(figure, axes, maps[kind], names, low=corrupted)
            axes.set_title(_KIND_NAMES.get(kind, kind), loc="left")

    answer = one_line(columns["answer"][0], 40)
    caption = (
        f"Case {one_line(case, 40)}: probability of {answer!r} with each state restored; clean"
        f" {clean:.3f}, corrupted {corrupted:.3f}. Tokens of the subject have an asterisk."
    )
    places = []
    for kind, values in maps.items():
        token, layer = np.unravel_index(int(np.nanargmax(values)), values.shape)
        where = f"{names[token]!r}, layer {layer}"
        places.append(f"{_KIND_NAMES.get(kind, kind)}: {np.nanmax(values):.3f} at {where}")
    return draw(
        f"trace-fact-{number}", caption, "Largest: " + "; ".join(places), paint, 0.9 + 0.22 * tokens
    )


def _heat(
    figure: "Figure", axes: "Axes", values: Floats, names: Sequence[str], *, low: float
) -> None:
    """A map whose darkest colour is the largest value; `low` and less is white."""
    high = max(float(np.nanmax(values)), low + 1e-6)
    image = axes.imshow(values, cmap="Purples", vmin=low, vmax=high, aspect="auto")
    axes.grid(False)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("layer, counted from 0")
    whole_numbers(axes.xaxis)
    figure.colorbar(image, ax=axes)


def _by_kind(found: TraceSummary) -> dict[str, list[TracedEffect]]:
    kinds = dict.fromkeys(effect.kind for effect in found.trace.effects)
    return {kind: [e for e in found.trace.effects if e.kind == kind] for kind in kinds}


def _at(found: TraceSummary, site: str) -> list[TracedEffect]:
    return [effect for effect in found.trace.effects if effect.token_class == site]


def _peaks_said(found: TraceSummary) -> str:
    said = []
    for effect in _at(found, "last_subject"):
        peak = int(np.argmax(effect.means))
        name = _KIND_NAMES.get(effect.kind, effect.kind)
        said.append(f"{name}: {effect.means[peak]:.3g} at layer {peak}")
    return "Largest average effects at the last subject token: " + "; ".join(said)
