"""The figure of methods that look for neurons: in which layers they were found."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

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

_SHOWN = {"edited": True, "left, being the relation's": False}


def by_layer(arms: Sequence[Arm]) -> Picture | None:
    """How many neurons of facts are in each layer, edited or left; None without any."""
    shown = [
        (label if len(arms) == 1 else f"{arm.label}: {label}", curve)
        for arm in arms
        for label, edited in _SHOWN.items()
        if (curve := arm.curve(partial(_counts, edited=edited)))
    ]
    if not shown:
        return None

    def paint(figure: "Figure") -> None:
        (axes,) = panels(figure, 1, 1)
        for number, (label, curve) in enumerate(shown):
            plot_curve(axes, curve, label, line_style(number))
        from_zero(axes)
        axes.set_xlabel("layer, counted from 0")
        axes.set_ylabel("neurons, summed over facts")
        whole_numbers(axes.xaxis)
        legend_below(figure, axes)

    caption = (
        "Neurons by layer: those that the prompts of a fact agree on, counted once for every fact."
    )
    alt = "; ".join(
        f"{label}: " + ", ".join(f"{point[1]:.0f} in layer {point[0]:.0f}" for point in curve)
        for label, curve in shown
    )
    return draw("neurons", caption, alt, paint, 2.7 + 0.1 * len(shown))


def _counts(findings: Findings, *, edited: bool) -> Iterable[tuple[float, float]]:
    """(layer, neurons), of every layer that was looked at."""
    neurons = findings.neurons
    layers = neurons["layer"][neurons["is_edited"] == float(edited)]
    if not layers.size:
        return
    looked_at = sorted({norm.layer for norm in findings.norms})
    for layer in looked_at:
        yield float(layer), float(np.count_nonzero(layers == layer))
