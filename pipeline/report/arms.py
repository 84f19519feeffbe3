"""Arms of a comparison: runs that differ in their seed only are one line in a figure."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.evaluation.metrics import SCORES, exact_of
from pipeline.report.findings import Findings
from pipeline.report.style import Curve

Entry = dict[str, Any]
Labelled = Sequence[tuple[str, Findings]]

_SEED = re.compile(r"(-|, )seed ?-?\d+$")

# What names a run or says how widely it ran, and so tells no method from another.
_NOT_COMPARED = ("name", "seed")
_NO_PART_COMPARED = ("output.", "cluster.", "compare.")


@dataclass(frozen=True)
class Arm:
    """Runs of one spec with different seeds; most often a single one.

    Attributes:
        label: what it is called in figures and tables.
        runs: what was found of each run.
    """

    label: str
    runs: tuple[Findings, ...]

    @property
    def interval(self) -> str:
        """What its intervals are."""
        count = len(self.runs)
        return "95 %, over edits" if count == 1 else f"least to greatest of {count} seeds"

    @property
    def last(self) -> Entry | None:
        """Scores after the last evaluated round; None where a run has none."""
        return _merged([run.last for run in self.runs])

    @property
    def baseline(self) -> Entry | None:
        """Scores of the unedited model; None where a run has none."""
        return _merged([run.baseline for run in self.runs])

    def entries(self, of: Callable[[Findings], list[Entry]]) -> list[Entry]:
        """Entries of scores by `round`, over the runs; where one lacks a round, there is none."""
        by_round = [{entry["round"]: entry for entry in of(run)} for run in self.runs]
        found = (_merged([entries.get(round) for entries in by_round]) for round in by_round[0])
        return [entry for entry in found if entry is not None]

    def curve(self, of: Callable[[Findings], Iterable[tuple[float, float]]]) -> Curve:
        """A measured curve: the mean of the runs, their least and their greatest."""
        by_x = [dict(of(run)) for run in self.runs]
        shared = sorted(x for x in by_x[0] if all(x in other for other in by_x[1:]))
        columns = [(x, [points[x] for points in by_x]) for x in shared]
        return [(x, fmean(values), min(values), max(values)) for x, values in columns]


def arms(labelled: Labelled) -> list[Arm]:
    """Put runs of one spec together, in the order of the first of each.

    An arm of several runs is called as they are, without the seed in their labels; else by its
    method where no other arm has that; else by its first run.
    """
    grouped: dict[Any, list[tuple[str, Findings]]] = {}
    for label, findings in labelled:
        grouped.setdefault(_identity(findings), []).append((label, findings))
    groups = list(grouped.values())
    methods = [method_name(group[0][1]) for group in groups]
    found = []
    for group, method in zip(groups, methods, strict=True):
        label, runs = group[0][0], tuple(findings for _, findings in group)
        if len(runs) > 1:
            plain = {_SEED.sub("", label) for label, _ in group}
            other = method if methods.count(method) == 1 else f"{label} and its seeds"
            label = plain.pop() if len(plain) == 1 else other
        found.append(Arm(label, runs))
    return found


def method_name(findings: Findings) -> str:
    """A run's method with its wrappers."""
    method = findings.recorded.spec.get("method")
    method = method if isinstance(method, dict) else {}
    wrappers = method.get("wrappers") or ()
    return " + ".join(str(part) for part in (method.get("name", ""), *wrappers))


def _identity(findings: Findings) -> Any:
    settings = {
        name: value
        for name, value in findings.settings.items()
        if name not in _NOT_COMPARED and not name.startswith(_NO_PART_COMPARED)
    }
    if findings.recorded.contexts_source == "generated":
        settings.pop("method.contexts", None)  # drawn by the seed
    return tuple(sorted(settings.items())), findings.recorded.model.fingerprint


def _merged(entries: Sequence[Entry | None]) -> Entry | None:
    """The runs' scores as one entry; None where a run has none."""
    known = [entry for entry in entries if entry is not None]
    if len(known) < len(entries):
        return None
    if len(known) == 1:
        return known[0]
    found: Entry = {name: known[0].get(name) for name in ("round", "edits")}
    found |= {name: _mean([entry[name] for entry in known]) for name in (*SCORES, "S")}
    exact = {kind: _mean([exact_of(entry, kind) for entry in known]) for kind in SCORES.values()}
    return found | {"probes": {kind: {"exact": score} for kind, score in exact.items()}}


def _mean(scores: Sequence[Entry | None]) -> Entry | None:
    """The mean with the least and the greatest; None where a run has none."""
    known = [score["score"] for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    return {"score": fmean(known), "low": min(known), "high": max(known)}
