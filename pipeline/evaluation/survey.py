"""What a survey says of a cell: the measures of Yao et al. (arXiv 2305.13172), with intervals.

All shares are in per cent, means over edits of the mean over an edit's probes:

- reliability: rewrite probes that are exact (every token of the new answer is the argmax);
- generality: paraphrases that are;
- locality: neighborhood and locality probes that are unchanged (the argmax at every token of the
  answer is the unedited model's, right or wrong);
- portability: portability probes that are exact;
- rewrite_success, paraphrase_success, neighborhood_success: success as ROME counts it (ES, PS, NS).

Definitions of exact, unchanged and success: `pipeline.evaluation.metrics`. Yao et al. average over
an answer's tokens where here all must be right.

Costs, an edit: `seconds` of all workers and reducers while they edited, evaluation left out;
`wall_seconds` of the phases that edit, at the number of workers that there were; `memory`, bytes
beyond the loaded model at the peak of a worker plus the peak of a reducer, of the whole cell.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluation.intervals import interval

SHARES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "reliability": (("rewrite",), "exact"),
    "generality": (("paraphrase",), "exact"),
    "locality": (("neighborhood", "locality"), "unchanged"),
    "portability": (("portability",), "exact"),
    "rewrite_success": (("rewrite",), "success"),
    "paraphrase_success": (("paraphrase",), "success"),
    "neighborhood_success": (("neighborhood",), "success"),
}
"""Measure -> the kinds of probe, and the column of metrics/."""

COSTS = ("seconds", "wall_seconds", "memory")

_NOT_EDITING = ("start", "covariance", "baseline", "evaluation", "general")


def share_rows(metrics: pa.Table) -> list[dict[str, Any]]:
    """Every share of a table of scores with its interval: `measure`, `value`, `low`, `high`,
    `count` (edits), and `reason` where there is nothing to give.

    Args:
        metrics: rows of metrics/ of the edits to count, one round's or several.
    """
    return [_share_row(metrics, name, *of) for name, of in SHARES.items()]


def cost_rows(
    manifest: Mapping[str, Any], seconds: Mapping[str, float], edits: int
) -> list[dict[str, Any]]:
    """What a finished cell took an edit; see the module's text.

    Args:
        manifest: the run's.
        seconds: of each of its phases.
        edits: how many it has made.
    """
    wall = sum(value for name, value in seconds.items() if name not in _NOT_EDITING)
    used = [worker.get("editing") for worker in manifest.get("peak_worker_memory_bytes", [])]
    # One that was never called knows of no peak: a reducer whose study has lanes, say.
    workers = [entry for entry in used if entry is not None and entry["seconds"] > 0]
    reducers = [entry for entry in manifest.get("reducers_used", []) if entry["seconds"] > 0]
    busy = sum(entry["seconds"] for entry in [*workers, *reducers])
    kinds = ("resident", "device")
    peaks = [_peak(workers, kind) + _peak(reducers, kind) for kind in kinds]
    interrupted = "the run was interrupted" if manifest.get("resumed") else None
    unknown = "this system tells no peak of a process"
    has_peak = all(entry["resident"] is not None for entry in [*workers, *reducers])
    return [
        _cost_row("seconds", busy / edits, interrupted),
        _cost_row("wall_seconds", wall / edits, None),
        _cost_row("memory", sum(peaks), interrupted or (None if has_peak else unknown)),
    ]


def _share_row(
    metrics: pa.Table, measure: str, kinds: Collection[str], column: str
) -> dict[str, Any]:
    is_kind = pc.is_in(metrics["probe"], pa.array(list(kinds)))
    asked = metrics.filter(is_kind)
    known = asked.filter(pc.is_valid(asked[column]))
    if not known.num_rows:
        reason = "no probes" if not asked.num_rows else f"its probes have no {column}"
        return {"measure": measure, "count": 0, "reason": reason}
    numbers = known.set_column(0, "value", known[column].cast(pa.float64()))
    by_edit = numbers.group_by("case_id", use_threads=False).aggregate([("value", "mean")])
    # In one order, since the bootstrap draws by place.
    means = by_edit.sort_by("case_id")["value_mean"].to_numpy()
    low, high = interval(means)
    shares = {"value": float(means.mean()), "low": low, "high": high}
    return {
        "measure": measure,
        "count": len(means),
        **{name: 100.0 * share for name, share in shares.items()},
    }


def _cost_row(measure: str, value: float, unknown: str | None) -> dict[str, Any]:
    if unknown is not None:
        return {"measure": measure, "reason": unknown}
    return {"measure": measure, "value": value}


def _peak(used: Sequence[Mapping[str, Any]], kind: str) -> int:
    return max((entry[kind] or 0 for entry in used), default=0)
