"""The summary of a sequential study as tables for a terminal or a log: a line a scored round."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.evaluation.metrics import SCORES, exact_of
from pipeline.printable import one_line
from pipeline.report.summary import summary_tables

_COLUMNS = (*SCORES, "S")


def study_tables(summary: dict[str, Any]) -> RenderableType:
    """Scores after each evaluated round, what became of the requests, and the seconds.

    Raises:
        ResultsDamagedError: it is not a summary.
    """
    rest = summary_tables({**summary, "evaluation": {"rounds": []}})
    if not summary["evaluation"]["rounds"]:
        return rest
    title = Text(one_line(f"{summary['name']}: per cent, of all edits scored after a round"))
    table = Table(title=title, title_justify="left")
    own = ("ES, this round's", "untouched facts kept")
    for column in ("round", "edits", *_COLUMNS, "exact", *own):
        table.add_column(column, justify="right")
    current = {entry["round"]: entry for entry in summary["current"]["rounds"]}
    untouched = {entry["round"]: entry for entry in summary["untouched"]["rounds"]}
    for entry in summary["evaluation"]["rounds"]:
        number = entry["round"]
        table.add_row(
            "unedited" if number < 0 else str(number),
            str(entry["edits"]),
            *(_cell(entry, name) for name in _COLUMNS),
            _exact(entry),
            _cell(current.get(number), "ES"),
            _cell(untouched.get(number), "NS"),
        )
    return Group(table, rest)


def comparison_table(summaries: dict[str, dict[str, Any]]) -> RenderableType:
    """Scores of several studies after the last round that each was evaluated after, a line a study.

    Args:
        summaries: label of a study -> what its summary.json holds.
    """
    title = "per cent, of all edits scored after the last evaluated round"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("study", no_wrap=True)
    for column in ("round", "edits", *_COLUMNS, "exact", "untouched kept", "seconds"):
        table.add_column(column, justify="right")
    for label, summary in summaries.items():
        last = next(reversed(summary["evaluation"]["rounds"]), None)
        untouched = next(reversed(summary["untouched"]["rounds"]), None)
        table.add_row(
            Text(one_line(label)),
            "" if last is None else str(last["round"]),
            "" if last is None else str(last["edits"]),
            *(_cell(last, name) for name in _COLUMNS),
            _exact(last),
            _cell(untouched, "NS"),
            f"{sum(summary['seconds'].values()):.0f}",
        )
    return table


def _cell(entry: dict[str, Any] | None, name: str) -> str:
    return _text(None if entry is None else entry[name])


def _exact(entry: dict[str, Any] | None) -> str:
    """How many rewrites the model says: of a ruined one S is about 50, and this is 0."""
    return _text(None if entry is None else exact_of(entry, "rewrite"))


def _text(score: dict[str, Any] | None) -> str:
    return "" if score is None else f"{score['score']:.1f}"
