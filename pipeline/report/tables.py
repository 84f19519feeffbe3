"""The tables of the page: every cell is text already."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.evaluation.metrics import SCORES, exact_of
from pipeline.report.figures_scores import SCORE_NAMES
from pipeline.report.figures_search import search_measures
from pipeline.report.figures_time import growth, phases_of
from pipeline.report.findings import PATCH_MEASURES, PROBLEMS_SHOWN, Findings, Floats

Labelled = Sequence[tuple[str, Findings]]
_Score = dict[str, float]


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        caption: what it holds.
        head: the columns' names.
        rows: cells; the first one of a row names it.
        numbers: which columns are numbers, to be aligned as such.
    """

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: frozenset[int] = field(default_factory=frozenset)


def scores(labelled: Labelled) -> Table | None:
    """Success and exact match of every kind of probe, before and after; None without probes."""
    rows: list[tuple[str, ...]] = []
    for label, findings in labelled:
        entries = [entry for entry in (findings.baseline, findings.last) if entry is not None]
        for entry in entries:
            model = "unedited" if entry["round"] < 0 else _edited(findings, entry["round"])
            for name, title in SCORE_NAMES.items():
                exact = exact_of(entry, SCORES[name]) if name in SCORES else None
                rows.append((label, model, title, score_text(entry[name]), score_text(exact)))
            for kind in entry["probes"]:
                if kind not in SCORES.values():
                    success = score_text(entry["probes"][kind].get("success"))
                    rows.append((label, model, kind, success, score_text(exact_of(entry, kind))))
    if not rows:
        return None
    head = ("run", "model", "probe", "success", "exact")
    caption = "Scores in per cent, with 95 % intervals over edits"
    return Table(caption, head, rows, frozenset({3, 4}))


def requests(labelled: Labelled) -> Table:
    """What became of the requests."""
    statuses = list(dict.fromkeys(s for _, f in labelled for s in f.summary["requests"]))
    rows = [
        (
            label,
            *(str(findings.summary["requests"].get(status, 0)) for status in statuses),
            str(findings.summary.get("not_taken", "")),
        )
        for label, findings in labelled
    ]
    head = ("run", *statuses, "applied, but did not take")
    return Table("Requests by status", head, rows, frozenset(range(1, len(head))))


def request_counts(counts: dict[str, int]) -> Table:
    """What became of the requests of a job that edits nothing."""
    row = tuple(str(count) for count in counts.values())
    return Table("Requests", tuple(counts), [row], frozenset(range(len(row))))


def ages(labelled: Labelled) -> Table | None:
    """Scores by the age of the edit; None without a study."""
    rows = [
        (
            label,
            str(entry["round"]),
            str(entry["edits"]),
            *(score_text(entry[n]) for n in SCORE_NAMES),
        )
        for label, findings in labelled
        if findings.forgetting is not None
        for entry in findings.forgetting.by_age
    ]
    if not rows:
        return None
    head = ("run", "age, rounds", "edits scored", *SCORE_NAMES.values())
    caption = "Success in per cent by the age of the edit, with 95 % intervals over edits"
    return Table(caption, head, rows, frozenset(range(1, len(head))))


def updates(labelled: Labelled) -> Table | None:
    """Norms of the updates of each layer over the rounds; None without updates."""
    rows: list[tuple[str, ...]] = []
    for label, findings in labelled:
        for layer in sorted({norm.layer for norm in findings.norms}):
            norms = [norm for norm in findings.norms if norm.layer == layer]
            lengths = [norm.norm for norm in norms]
            factored = sum(norm.rank is not None for norm in norms)
            numbers = (np.min(lengths), np.median(lengths), np.max(lengths))
            rows.append(
                (label, str(layer), str(len(norms)), str(factored), *(f"{n:.4g}" for n in numbers))
            )
    if not rows:
        return None
    head = ("run", "layer", "updates", "kept as factors", "least", "median", "greatest")
    return Table("Frobenius norm of ΔW by layer", head, rows, frozenset(range(1, 7)))


def value_search(labelled: Labelled) -> Table | None:
    """Percentiles of how the searches ended; None without values."""
    found = [(label, search_measures(findings)) for label, findings in labelled]
    return _percentiles("How the value searches ended", "values", found)


def patches(labelled: Labelled) -> Table | None:
    """Percentiles of how the patches of edits ended; None without patches."""
    found = [(label, _patch_measures(findings.patches)) for label, findings in labelled]
    return _percentiles("How the training of patches ended, an edit", "edits", found)


def _patch_measures(patches: dict[str, Floats]) -> dict[str, Floats]:
    return {title: patches[name] for name, title in PATCH_MEASURES.items()}


def _percentiles(
    caption: str, counted: str, found: Sequence[tuple[str, dict[str, Floats]]]
) -> Table | None:
    """A row a run and measure; numbers that are not finite are left out."""
    rows = []
    for label, measures in found:
        for name, every in measures.items():
            column = every[np.isfinite(every)]
            if column.size:
                low, middle, high = np.percentile(column, [5, 50, 95])
                numbers = (low, middle, high, column.max())
                rows.append((label, name, str(column.size), *(f"{n:.4g}" for n in numbers)))
    if not rows:
        return None
    head = ("run", "measure", counted, "5th percentile", "median", "95th percentile", "greatest")
    return Table(caption, head, rows, frozenset(range(2, 7)))


def seconds(labelled: Labelled) -> Table | None:
    """Seconds of each phase; None where none was recorded."""
    phases = phases_of([findings for _, findings in labelled])
    if not phases:
        return None
    rows = []
    for label, findings in labelled:
        times = findings.summary["seconds"]
        cells = [f"{times[phase]:.1f}" if phase in times else "" for phase in phases]
        rows.append((label, *cells, f"{sum(times.values()):.1f}"))
    head = ("run", *phases, "all")
    return Table("Wall-clock seconds of each phase", head, rows, frozenset(range(1, len(head))))


def round_seconds(labelled: Labelled) -> Table | None:
    """Seconds of the first and of the last rounds; None where they were not recorded."""
    rows = [
        (label, phase, str(count), f"{first:.2f}", f"{last:.2f}", f"{last / first:.2f}")
        for label, findings in labelled
        for phase, (count, first, last) in growth(findings).items()
        if first > 0
    ]
    if not rows:
        return None
    head = ("run", "phase", "rounds", "median of the first", "median of the last", "ratio")
    caption = "Seconds of a round at the beginning (without round 0) and at the end of a study"
    return Table(caption, head, rows, frozenset(range(2, 6)))


def workers(labelled: Labelled) -> Table:
    """The workers, how busy the value search kept them, and the memory that they took."""
    rows = []
    for label, findings in labelled:
        recorded = findings.recorded
        searched = float(np.nansum(findings.values["seconds"]))
        wall = findings.summary["seconds"].get("values", 0.0) * recorded.workers.count
        busy = f"{searched:.1f}" + (f" ({searched / wall:.0%})" if wall > 0 else "")
        memory = [f"{peak.resident / 1e9:.2f}" for peak in recorded.peak_worker_memory_bytes]
        on_gpu = [f"{peak.device / 1e9:.2f}" for peak in recorded.peak_worker_memory_bytes]
        where = (str(recorded.workers.count), recorded.workers.device)
        rows.append((label, *where, busy, ", ".join(memory), ", ".join(on_gpu)))
    head = (
        "run",
        "workers",
        "device",
        "seconds of value search, all workers (share of their time)",
        "peak memory of each, GB",
        "of it on a GPU, GB",
    )
    return Table("Workers", head, rows, frozenset({1, 3, 4, 5}))


def problems(label: str, findings: Findings) -> Table | None:
    """The requests that were not applied; None if all were."""
    if not findings.problems:
        return None
    columns = ("case_id", "status", "reason", "subject", "prompt", "target_new")
    rows = [tuple(_text(row[name]) for name in columns) for row in findings.problems]
    counts = findings.summary["requests"]
    total = sum(count for status, count in counts.items() if status != "applied")
    shown = f"the first {len(rows)} of {total}" if total > PROBLEMS_SHOWN else f"{len(rows)}"
    head = ("case", "status", "reason", "subject", "prompt", "new object")
    return Table(f"{label}: requests that were not applied ({shown})", head, rows)


def neighbours(label: str, findings: Findings) -> Table | None:
    """The neighbours that lost most; None where none flipped."""
    found = findings.neighbours
    if found is None or not found.worst:
        return None
    generated = any(row[when]["generated"] for row in found.worst for when in ("before", "after"))
    head = ["prompt", "case", "right", "new", "right: nats before", "after"]
    head += ["new: nats before", "after"]
    head += ["text before", "text after"] if generated else []
    rows = []
    for row in found.worst:
        before, after = row["before"], row["after"]
        cells = [_text(row[name]) for name in ("prompt", "case_id", "target_true", "target_new")]
        cells += [_nats(entry["nll_true"]) for entry in (before, after)]
        cells += [_nats(entry["nll_new"]) for entry in (before, after)]
        cells += [_text(before["generated"]), _text(after["generated"])] if generated else []
        rows.append(tuple(cells))
    caption = f"{label}: the neighbours that lost most, each prompt once, at its worst edit"
    return Table(caption, tuple(head), rows, frozenset({4, 5, 6, 7}))


def settings(labelled: Labelled) -> Table:
    """Every setting as resolved; with several runs those that differ come first."""
    names = list(dict.fromkeys(name for _, f in labelled for name in f.settings))
    rows = [(name, *(f.settings.get(name, "") for _, f in labelled)) for name in names]
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    head = ("setting", *(label for label, _ in labelled))
    caption = "Settings as resolved" + ("; those that differ first" if len(labelled) > 1 else "")
    return Table(caption, head, rows)


def origins(labelled: Labelled) -> Table:
    """Where and when each run was made, of which model and by which versions."""
    rows = []
    for label, findings in labelled:
        recorded = findings.recorded
        versions = ", ".join(f"{name} {v}" for name, v in recorded.versions.items() if v)
        model = f"{recorded.model.path} ({recorded.model.fingerprint[:12]})"
        dates = (recorded.started, recorded.finished or "")
        rows.append((label, recorded.status, model, *dates, versions))
    head = ("run", "status", "model (fingerprint)", "started", "finished", "versions")
    return Table("Runs", head, rows)


def score_text(score: _Score | None) -> str:
    """A score with its interval, empty where it is not defined."""
    if score is None:
        return ""
    return f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def _edited(findings: Findings, round: int) -> str:
    return "edited" if findings.rounds == 1 else f"after round {round}"


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _text(value: object) -> str:
    return "" if value is None else str(value)


def settings_of_groups(found: dict[str, str], groups: Sequence[str]) -> Table:
    """The settings that a job has a use for that edits nothing: its own groups, and what it reads.

    Args:
        found: the resolved spec, dotted names to text.
        groups: the groups that make the job, such as `trace`.
    """
    used = ("name", "model.", "requests.", *(f"{group}." for group in groups), "cluster.", "seed")
    rows = [(name, value) for name, value in found.items() if name.startswith(used)]
    return Table("Settings as resolved", ("setting", "value"), rows)
