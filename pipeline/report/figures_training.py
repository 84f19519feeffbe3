"""The figure of gradient methods: how the loss went down."""

from collections.abc import Iterable, Sequence
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


def loss_by_epoch(arms: Sequence[Arm]) -> Picture | None:
    """Mean loss of the edits before their step, in the order of epochs and rounds; None without."""
    shown = [(n, arm.label, arm.curve(_epochs)) for n, arm in enumerate(arms)]
    shown = [line for line in shown if line[2]]
    if not shown:
        return None

    def paint(figure: "Figure") -> None:
        (axes,) = panels(figure, 1, 1)
        for number, label, curve in shown:
            plot_curve(axes, curve, label, line_style(number))
        from_zero(axes)
        axes.set_xlabel("epochs, of one round after another")
        axes.set_ylabel("mean loss before a step, nats a target token")
        whole_numbers(axes.xaxis)
        legend_below(figure, axes)

    caption = "Training: the edits' mean loss in every epoch, each as it was before its step."
    alt = "; ".join(
        f"{label}: {curve[0][1]:.3g} in the first epoch, {curve[-1][1]:.3g} in the last"
        for _, label, curve in shown
    )
    return draw("training", caption, f"Mean loss: {alt}", paint, 2.7 + 0.1 * len(shown))


def _epochs(findings: Findings) -> Iterable[tuple[float, float]]:
    """(number of the epoch, mean loss), numbered through over the rounds."""
    training = findings.training
    if not training["loss"].size:
        return
    order = np.lexsort((training["step"], training["epoch"], training["round"]))
    ids = np.stack([training["round"][order], training["epoch"][order]], axis=1)
    _, first = np.unique(ids, axis=0, return_index=True)
    edits = training["edits"][order]
    losses = training["loss"][order] * edits
    for number, (start, stop) in enumerate(zip(first, [*first[1:], len(ids)], strict=True)):
        yield float(number), float(losses[start:stop].sum() / edits[start:stop].sum())
