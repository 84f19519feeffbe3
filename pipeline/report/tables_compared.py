"""The tables that set runs side by side, and that say of unfinished ones how far they are."""

from collections.abc import Sequence
from statistics import fmean

from pipeline.evaluation.metrics import exact_of
from pipeline.report.arms import Arm, Entry, Labelled, method_name
from pipeline.report.figures_model import last_update_norm, median_update
from pipeline.report.figures_scores import SCORE_NAMES
from pipeline.report.findings import Findings
from pipeline.report.tables import Table, score_text


def comparison(arms: Sequence[Arm]) -> Table | None:
    """A row a method: what is left, what was kept, and at which price; None for a single run."""
    if sum(len(arm.runs) for arm in arms) < 2:
        return None
    rows = []
    for arm in arms:
        last, untouched = arm.last, _untouched(arm)
        rows.append(
            (
                arm.label,
                " / ".join(dict.fromkeys(map(method_name, arm.runs))),
                "" if last is None else str(last["round"]),
                *("" if last is None else score_text(last[name]) for name in SCORE_NAMES),
                "" if last is None else score_text(exact_of(last, "rewrite")),
                score_text(None if untouched is None else untouched["NS"]),
                _spread([sum(run.summary["seconds"].values()) for run in arm.runs], ".0f"),
                _spread([median_update(run) for run in arm.runs], ".3g"),
                _spread([last_update_norm(run) for run in arm.runs], ".3g"),
                arm.interval,
            )
        )
    head = (
        "run",
        "method",
        "after round",
        *SCORE_NAMES.values(),
        "rewrite, exact",
        "untouched facts kept",
        "seconds",
        "median ‖ΔW‖ of a round, all layers",
        "‖sum of all ΔW‖, all layers",
        "intervals",
    )
    caption = "Side by side: per cent of all scored edits after the last evaluated round"
    return Table(caption, head, rows, frozenset(range(2, len(head) - 1)))


def phases(labelled: Labelled) -> Table | None:
    """How far the runs are that are not finished; None where all are."""
    rows = [
        (
            label,
            phase.name,
            f"{phase.done} of {phase.total} {phase.unit}",
            str(phase.left),
            str(len(phase.failed)),
        )
        for label, findings in labelled
        if findings.status is not None
        for phase in findings.status.phases
    ]
    if not rows:
        return None
    head = ("run", "phase", "done", "left", "requests that failed")
    return Table("What was done before the end", head, rows, frozenset({2, 3, 4}))


def _untouched(arm: Arm) -> Entry | None:
    def of(findings: Findings) -> list[Entry]:
        return findings.forgetting.untouched if findings.forgetting else []

    entries = [entry for entry in arm.entries(of) if entry["round"] >= 0]
    return entries[-1] if entries else None


def _spread(values: Sequence[float | None], shape: str) -> str:
    """A number, or the mean of several with the least and the greatest."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    if len(known) == 1:
        return f"{known[0]:{shape}}"
    return f"{fmean(known):{shape}} [{min(known):{shape}}, {max(known):{shape}}]"
