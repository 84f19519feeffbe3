"""The figure of an editor's training."""

from typing import TYPE_CHECKING

from pipeline.report.style import Picture, draw, legend_below, line_style, panels, whole_numbers
from pipeline.results.reading import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {"train": "trained on", "validation": "not trained on"}
_MEASURES = {
    "loss": "loss",
    "edit_loss": "edits, nats a token",
    "locality_loss": "divergence, nats a token",
    "success": "share of edits that succeed",
}


def curves(run: Run) -> Picture | None:
    """Every measure by step, of what was trained on and what was not; None without a step."""
    columns = run.training().to_pydict()
    shown = {
        name: title
        for name, title in _MEASURES.items()
        if any(value is not None for value in columns[name])
    }
    if not shown:
        return None
    rows = list(zip(columns["step"], columns["split"], strict=True))

    def paint(figure: "Figure") -> None:
        every = panels(figure, len(shown), 2)
        for axes, (name, title) in zip(every, shown.items(), strict=True):
            for number, (split, label) in enumerate(_NAMES.items()):
                points = [
                    (step, value)
                    for (step, of), value in zip(rows, columns[name], strict=True)
                    if of == split and value is not None
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    markers = max(1, len(x) // 12)
                    axes.plot(x, y, label=label, markevery=markers, **line_style(number))
            axes.set_title(title, loc="left")
            axes.set_xlabel("step")
            whole_numbers(axes.xaxis)
        legend_below(figure, every[0])

    losses = columns["loss"]
    caption = "Training, step by step; a step's loss is that before it."
    alt = f"Loss: {losses[0]:.3g} at first, {losses[-1]:.3g} at last"
    return draw("training", caption, alt, paint, 0.6 + 2.3 * -(-len(shown) // 2))
