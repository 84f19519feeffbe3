"""Figure and tables of an assessment: which facts a model holds, and which it holds least."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.report.assess_summary import Assessment, by_share, cells
from pipeline.report.findings import Floats
from pipeline.report.reading import read_columns
from pipeline.report.style import BLUE, VERMILION, Picture, draw, legend_below, panels
from pipeline.report.tables import Table
from pipeline.results.reading import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS = 40
_LEAST_HELD = 50
_COLUMNS = ["case_id", "prompt", "subject", "object", "probability", "contrastive", "score"]


def ratios(run: Run, found: Assessment) -> Picture | None:
    """How many facts have which ratio, held or not; None where no ratio is a positive number."""
    scores = read_columns(run, "assessment", ["score"])["score"].drop_null().to_numpy()
    logs = np.log10(scores[np.isfinite(scores) & (scores > 0)])
    if not logs.size:
        return None
    threshold = math.log10(found.threshold) if found.threshold > 0 else -math.inf
    parts = [logs[logs <= threshold], logs[logs > threshold]]
    edges = _edges(logs, threshold)

    def paint(figure: "Figure") -> None:
        (axes,) = panels(figure, 1, 1)
        names = ["not held", "held"]
        axes.hist(parts, edges.tolist(), stacked=True, label=names, color=[VERMILION, BLUE])
        if math.isfinite(threshold):
            axes.axvline(threshold, color="black", linewidth=1, linestyle=":", label="threshold")
        axes.set_xlabel("log10 of the ratio of probabilities")
        axes.set_ylabel("facts")
        legend_below(figure, axes)

    apart = len(scores) - len(logs)
    caption = (
        "Facts by their ratio: the probability of the object behind the fact's own prompt over"
        " that behind prompts of other relations."
    )
    if apart:
        caption += f" {apart} of ratio 0 or without end are not drawn."
    alt = f"{len(parts[1])} facts above the threshold of {found.threshold:g}, {len(parts[0])} not"
    return draw("ratios", caption, alt, paint, 2.7)


def _edges(logs: Floats, threshold: float) -> Floats:
    """Edges of bins of one width, the threshold among them where it is a number."""
    edges: Floats = np.histogram_bin_edges(logs, _BINS)
    if not math.isfinite(threshold):
        return edges
    width = edges[1] - edges[0]
    first = math.floor((edges[0] - threshold) / width)
    last = math.ceil((edges[-1] - threshold) / width)
    return threshold + width * np.arange(first, last + 1)


def relations_table(found: Assessment) -> Table:
    """Facts of each relation and how many are held, those held least first, and of all."""
    rows = [(name or "(none)", *cells(relation)) for name, relation in by_share(found)]
    head = ("relation", "facts", "held", "wrong", "held, %")
    return Table("Facts by relation", head, [*rows, ("all", *cells(found))], frozenset(range(1, 5)))


def least_held(run: Run) -> Table | None:
    """The facts that are not held and have the least ratios; None where all are held."""
    wrong = read_columns(run, "assessment", _COLUMNS, pc.invert(pc.field("is_held")))
    if not wrong.num_rows:
        return None
    least = wrong.sort_by([("score", "ascending"), ("case_id", "ascending")])
    rows = [_row(row) for row in least.slice(0, _LEAST_HELD).to_pylist()]
    head = ("case_id", "prompt", "object", "probability", "behind other prompts", "ratio")
    return Table(f"Facts that are not held{_said(wrong)}", head, rows, frozenset({3, 4, 5}))


def _said(wrong: pa.Table) -> str:
    if wrong.num_rows <= _LEAST_HELD:
        return ""
    return f": the {_LEAST_HELD} with the least ratios of {wrong.num_rows}"


def _row(fact: dict[str, Any]) -> tuple[str, ...]:
    prompt = fact["prompt"].replace("{}", fact["subject"])
    numbers: Sequence[float | None] = (fact["probability"], fact["contrastive"], fact["score"])
    texts = ("" if number is None else f"{number:.3g}" for number in numbers)
    return fact["case_id"], prompt, fact["object"], *texts
