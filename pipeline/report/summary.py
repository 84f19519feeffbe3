"""The summary of a run as tables for a terminal or a log."""

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.metrics import SCORES
from pipeline.printable import one_line
from pipeline.results.recorded import RecordedSummary, check_recorded

_NAMES = {
    "ES": "rewrite (ES)",
    "PS": "paraphrase (PS)",
    "NS": "neighbourhood (NS)",
}
_MOST_PROBLEMS = 20

_Score = dict[str, float]


def summary_tables(summary: dict[str, Any]) -> RenderableType:
    """Scores before and after with 95 % intervals, what became of the requests, and the seconds.

    Raises:
        ResultsDamagedError: it is not a summary.
    """
    check_recorded(summary, RecordedSummary, "summary.json")
    parts: list[RenderableType] = []
    if summary["evaluation"]["rounds"]:
        parts.append(_scores(summary))
    counts = ", ".join(f"{count} {status}" for status, count in summary["requests"].items())
    parts.append(Text(one_line(f"requests: {counts}")))
    if missed := summary.get("not_taken"):
        parts.append(Text(f"edits that did not take: {missed}; their reason is in edits/"))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items())
    parts.append(Text(one_line(f"time: {seconds}")))
    return Group(*parts)


def problem_lines(edits: list[dict[str, Any]]) -> list[str]:
    """One line for each request that was not applied, the first twenty, and how many more."""
    problems = [row for row in edits if row["status"] != "applied"]
    lines = [
        f"{row['status']}: {one_line(row['case_id'], 80)}: {' '.join(row['reason'].split())}"
        for row in problems[:_MOST_PROBLEMS]
    ]
    if len(problems) > _MOST_PROBLEMS:
        lines.append(
            f"... and {len(problems) - _MOST_PROBLEMS} more; see edits/ in the run directory"
        )
    return lines


def _scores(summary: dict[str, Any]) -> Table:
    rounds = summary["evaluation"]["rounds"]
    title = Text(one_line(f"{summary['name']}: per cent [95 % interval]"))
    table = Table(title=title, title_justify="left")
    for column in ("probe", "model"):
        table.add_column(column)
    for column in ("success", "exact"):
        table.add_column(column, justify="right")
    for score, kind in SCORES.items():
        _add_rows(table, _NAMES[score], [(e, e[score], _exact(e, kind)) for e in rounds])
    _add_rows(table, "harmonic mean (S)", [(e, e["S"], None) for e in rounds])
    for kind in _other_kinds(rounds):
        _add_rows(table, escape(one_line(kind)), [(e, None, _exact(e, kind)) for e in rounds])
    return table


def _add_rows(
    table: Table, name: str, entries: list[tuple[dict[str, Any], _Score | None, _Score | None]]
) -> None:
    """One line before the edits and one after, closed by a rule."""
    for number, (entry, success, exact) in enumerate(entries):
        model = "unedited" if entry["round"] < 0 else "edited"
        table.add_row("" if number else name, model, _cell(success), _cell(exact))
    table.add_section()


def _other_kinds(rounds: list[dict[str, Any]]) -> list[str]:
    kinds = dict.fromkeys(kind for entry in rounds for kind in entry["probes"])
    return [kind for kind in kinds if kind not in SCORES.values()]


def _exact(entry: dict[str, Any], kind: str) -> _Score | None:
    probe = entry["probes"].get(kind)
    return None if probe is None else probe["exact"]


def _cell(score: _Score | None) -> str:
    if score is None:
        return ""
    return f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"
