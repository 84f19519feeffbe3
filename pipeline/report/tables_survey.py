"""The tables of a survey, for the page and for the terminal."""

from collections.abc import Sequence

from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from pipeline.printable import one_line
from pipeline.report.surveyed import SETTINGS, SHOWN, SUCCESSES, Group, Point
from pipeline.report.tables import Table, score_text

_COSTS = {
    "seconds": "seconds an edit",
    "wall_seconds": "wall-clock",
    "memory": "MB beyond the model",
}

_SHORT_COSTS = ("s an edit", "wall", "MB")


def survey_tables(groups: Sequence[Group]) -> RenderableType:
    """A survey for a terminal or a log: its tables without intervals, and what is missing."""
    found: list[Table | None] = []
    for group in groups:
        found += [scores(group, setting, is_short=True) for setting in group.settings()]
        found.append(missing(group))
    return Renderables(*(_for_terminal(table) for table in found if table is not None))


def scores(group: Group, setting: str, *, is_short: bool = False) -> Table:
    """A row an editor and size: what the edits reached, and what they cost.

    Short, it has the four shares of the survey alone, without intervals.
    """
    is_sized = setting != "single"
    names = SHOWN if is_short else {**SHOWN, **SUCCESSES}
    rows = []
    for _, editor, points in group.of(setting):
        for point in points:
            size = (f"{point.edits:,}",) if is_sized else ()
            if point.status != "done":
                rows.append((editor, *size, point.status, *[""] * (len(names) + len(_COSTS))))
                continue
            shares = [_share(point, name, is_short) for name in names]
            costs = [_cost(point, name) for name in _COSTS]
            rows.append((editor, *size, _edits(point), *shares, *costs))
    head = ("editor", *(("edits",) if is_sized else ()), "scored", *names.values())
    head = (*head, *(_SHORT_COSTS if is_short else _COSTS.values()))
    what = "per cent" if is_short else "per cent with 95 % intervals over edits"
    caption = f"{group.title}. {SETTINGS[setting]}: {what}"
    return Table(caption, head, rows, frozenset(range(1, len(head))))


def missing(group: Group) -> Table | None:
    """Every cell and every figure that is not there, with the reason; None where all are."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for setting in group.settings():
        for _, editor, points in group.of(setting):
            for point in points:
                for what, reason in _absent(point):
                    rows.setdefault((editor, setting, what, reason), []).append(f"{point.edits:,}")
    if not rows:
        return None
    # What is missing of several editors alike is one row.
    alike: dict[tuple[str, ...], list[str]] = {}
    for (editor, setting, what, reason), sizes in rows.items():
        alike.setdefault((setting, ", ".join(sizes), what, reason), []).append(editor)
    everyone = len(group.editors)
    cells = [
        ("all editors" if 1 < len(editors) == everyone else ", ".join(editors), *cell)
        for cell, editors in alike.items()
    ]
    head = ("editor", "setting", "edits", "what", "reason")
    return Table(f"{group.title}. What is missing above, and why", head, cells)


def _absent(point: Point) -> list[tuple[str, str]]:
    if point.status != "done":
        what = "cannot be done" if point.status == "impossible" else "failed"
        return [(what, point.reason or "")]
    found = [
        (name, row["reason"] or "")
        for name, row in point.measures.items()
        if row["value"] is None and name in {**SHOWN, **SUCCESSES, **_COSTS}
    ]
    failed = point.measures.get("failed_edits")
    if failed is not None and failed["value"]:
        found.append((f"{failed['value']:.0f} edits failed", f"the first: {failed['reason']}"))
    return found


def _edits(point: Point) -> str:
    """How many edits the shares are over, where they all are over the same."""
    return f"{max(row['count'] or 0 for row in point.measures.values()):,}"


def _share(point: Point, name: str, is_short: bool) -> str:
    row = point.measures.get(name)
    if row is None:
        return ""
    if row["value"] is None:
        return row["reason"] if row["reason"] == "no probes" else ""
    if is_short:
        return f"{row['value']:.1f}"
    return score_text({"score": row["value"], "low": row["low"], "high": row["high"]})


def _cost(point: Point, name: str) -> str:
    row = point.measures.get(name)
    if row is None or row["value"] is None:
        return ""
    return f"{row['value'] / 1e6:.0f}" if name == "memory" else f"{row['value']:.2g}"


def _for_terminal(table: Table) -> RichTable:
    found = RichTable(title=Text(one_line(table.caption)), title_justify="left")
    for number, name in enumerate(table.head):
        found.add_column(name, justify="right" if number in table.numbers else "left")
    for row in table.rows:
        found.add_row(*(Text(one_line(cell)) for cell in row))
    return found
