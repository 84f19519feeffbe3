"""The summary of a run as tables for a terminal or a log."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.metrics import SCORES

_NAMES = {
    "ES": "rewrite (ES)",
    "PS": "paraphrase (PS)",
    "NS": "neighbourhood (NS)",
}
_MOST_PROBLEMS = 20


def summary_tables(summary: dict[str, Any]) -> RenderableType:
    """Scores before and after with 95 % intervals, what became of the requests, and the seconds."""
    parts: list[RenderableType] = []
    if summary["evaluation"]["rounds"]:
        parts.append(_scores(summary))
    counts = ", ".join(f"{count} {status}" for status, count in summary["requests"].items())
    parts.append(Text(f"requests: {counts}"))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in summary["seconds"].items())
    parts.append(Text(f"time: {seconds}"))
    return Group(*parts)


def problem_lines(edits: list[dict[str, Any]]) -> list[str]:
    """One line for each request that was not applied, the first twenty, and how many more."""
    problems = [row for row in edits if row["status"] != "applied"]
    lines = [
        f"{row['status']}: {row['case_id']}: {_one_line(row['reason'])}"
        for row in problems[:_MOST_PROBLEMS]
    ]
    if len(problems) > _MOST_PROBLEMS:
        lines.append(f"... and {len(problems) - _MOST_PROBLEMS} more; see edits/ in the run directory")
    return lines


def _scores(summary: dict[str, Any]) -> Table:
    rounds = summary["evaluation"]["rounds"]
    table = Table(title=f"{summary['name']} (per cent, 95 % interval)", title_justify="left")
    table.add_column("probe")
    for entry in rounds:
        name = "before" if entry["round"] < 0 else "after"
        table.add_column(f"{name}: success", justify="right")
        table.add_column(f"{name}: exact", justify="right")
    for score, kind in SCORES.items():
        cells = [
            cell
            for entry in rounds
            for cell in (_cell(entry[score]), _cell(_exact(entry, kind)))
        ]
        table.add_row(_NAMES[score], *cells)
    combined = [cell for entry in rounds for cell in (_cell(entry["S"]), "")]
    table.add_row("harmonic mean (S)", *combined)
    for kind in _other_kinds(rounds):
        table.add_row(kind, *(c for e in rounds for c in ("", _cell(_exact(e, kind)))))
    return table


def _other_kinds(rounds: list[dict[str, Any]]) -> list[str]:
    kinds = dict.fromkeys(kind for entry in rounds for kind in entry["probes"])
    return [kind for kind in kinds if kind not in SCORES.values()]


def _exact(entry: dict[str, Any], kind: str) -> dict[str, float] | None:
    probe = entry["probes"].get(kind)
    return None if probe is None else probe["exact"]


def _cell(score: dict[str, float] | None) -> str:
    if score is None:
        return "-"
    return f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def _one_line(text: str) -> str:
    return " ".join(text.split())
