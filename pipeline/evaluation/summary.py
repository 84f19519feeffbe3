"""What summary.json says of a job: everything counted that its tables hold."""

from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluation.general import summarise_general
from pipeline.evaluation.metrics import summarise
from pipeline.results.schemas import STATUSES

_UNTOUCHED = -1


def summarise_job(
    edits: pa.Table,
    metrics: pa.Table,
    general: pa.Table,
    rounds: list[dict[str, Any]] | None = None,
    *,
    rolled_back: bool = False,
) -> dict[str, Any]:
    """Aggregate a job's tables: plain JSON, no number that is not finite.

    Args:
        edits: rows of edits/.
        metrics: rows of metrics/.
        general: rows of general/.
        rounds: the seconds of a study's rounds; None for a batch.
        rolled_back: whether each round began at the unedited model; scores are then of all rounds'
            edits together, under the number of the last.

    Returns:
        `requests` by status, `not_taken`, `evaluation` of all edits, in a study also `current`
        (each round's own edits), `untouched` facts and `rounds`, and `general`.
    """
    statuses = Counter(edits["status"].to_pylist())
    is_not_taken = pc.and_(pc.equal(edits["status"], "applied"), pc.not_equal(edits["reason"], ""))
    if rolled_back:
        metrics = _as_one_round(metrics)
    edited = metrics.filter(pc.greater_equal(metrics["edit_round"], 0))
    summary: dict[str, Any] = {
        "requests": {status: statuses.get(status, 0) for status in STATUSES},
        "not_taken": pc.sum(is_not_taken).as_py() or 0,
        "evaluation": summarise(edited),
    }
    if rounds is not None:
        is_own = pc.equal(edited["edit_round"], edited["round"])
        if rolled_back:
            is_own = pc.greater_equal(edited["round"], 0)
        current = edited.filter(is_own)
        untouched = metrics.filter(pc.equal(metrics["edit_round"], _UNTOUCHED))
        summary["current"] = summarise(current)
        summary["untouched"] = summarise(untouched)
        summary["rounds"] = rounds
    summary["general"] = summarise_general(general)
    return summary


def _as_one_round(metrics: pa.Table) -> pa.Table:
    """Scores of rounds that are rolled back, as if one round had made all edits."""
    last = pc.max(metrics["round"])
    one = pc.if_else(pc.less(metrics["round"], 0), metrics["round"], last)
    return metrics.set_column(metrics.column_names.index("round"), "round", one)
