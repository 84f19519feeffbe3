"""A survey's table as the report needs it: by group, setting, editor and size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SHOWN = {
    "reliability": "reliability",
    "generality": "generality",
    "locality": "locality",
    "portability": "portability",
}
"""Measures that tables and figures show, and what they are called."""
SUCCESSES = {
    "rewrite_success": "rewrite success (ES)",
    "paraphrase_success": "paraphrase success (PS)",
    "neighborhood_success": "neighbourhood success (NS)",
}
SETTINGS = {
    "single": "Single edits, rolled back",
    "batch": "Batches",
    "sequence": "Sequences",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One editor at one size of one setting.

    Attributes:
        edits: how many edits had been made.
        status: done, impossible or failed.
        reason: why it is not done.
        measures: rows of the survey's table by measure.
    """

    edits: int
    status: str
    reason: str | None
    measures: dict[str, Row]


@dataclass(frozen=True)
class Group:
    """All that was done on one model with one data set.

    Attributes:
        model, dataset: labels.
        editors: labels, in the survey's order.
        points: (setting, editor) -> its points by size.
    """

    model: str
    dataset: str
    editors: tuple[str, ...]
    points: dict[tuple[str, str], list[Point]]

    @property
    def title(self) -> str:
        """What it is called in captions."""
        return f"{self.model}, {self.dataset}"

    def settings(self) -> list[str]:
        """The settings that were asked for, in the order of `SETTINGS`."""
        asked = {setting for setting, _ in self.points}
        return [setting for setting in SETTINGS if setting in asked]

    def of(self, setting: str) -> Iterator[tuple[int, str, list[Point]]]:
        """Every editor that was asked for in a setting: its number among all, label and points."""
        for number, editor in enumerate(self.editors):
            if (setting, editor) in self.points:
                yield number, editor, self.points[setting, editor]


def groups_of(table: pa.Table) -> list[Group]:
    """Put the rows of survey.parquet together, in the order in which they stand there."""
    rows: list[Row] = table.to_pylist()
    found = []
    for model, dataset in dict.fromkeys((row["model"], row["dataset"]) for row in rows):
        own = [row for row in rows if (row["model"], row["dataset"]) == (model, dataset)]
        editors = tuple(dict.fromkeys(row["editor"] for row in own))
        keys = dict.fromkeys((row["setting"], row["editor"]) for row in own)
        points = {
            key: _points([row for row in own if (row["setting"], row["editor"]) == key])
            for key in keys
        }
        found.append(Group(model, dataset, editors, points))
    return found


def _points(rows: Sequence[Row]) -> list[Point]:
    found = []
    for edits in sorted({row["edits"] for row in rows}):
        own = [row for row in rows if row["edits"] == edits]
        measures = {row["measure"]: row for row in own if row["measure"] is not None}
        # Of a sequence that failed, what it had reached is done.
        status = "done" if measures else own[0]["status"]
        found.append(Point(edits, status, None if measures else own[0]["reason"], measures))
    return found
