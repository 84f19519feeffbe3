"""What taking edits out of a run changed, as tables for a terminal or a log."""

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.printable import one_line

_PARTS = {"removed": "removed edits", "others": "other edits", "untouched": "untouched facts"}
_SCORES = ("ES", "PS", "NS", "S")
_LONGEST_PROMPT = 60


def unedit_tables(summary: dict[str, Any]) -> RenderableType:
    """Scores before and after, what flipped, how far the weights went, and the worst probes.

    Args:
        summary: what `unedit.json` holds.
    """
    parts: list[RenderableType] = [_scores(summary), _flips(summary)]
    if summary["layers"]:
        parts.append(_layers(summary))
    if worst := summary.get("others", {}).get("worst"):
        parts.append(_worst(worst))
    old = summary["removed"]["old_again"]
    parts.append(Text(f"removed edits whose old object is the likelier one: {_of(old)}"))
    return Group(*parts)


def _of(old: dict[str, int]) -> str:
    return f"{old['count']} of {old['edits']}" if old["edits"] else "no old object is known"


def _scores(summary: dict[str, Any]) -> Table:
    table = _table("per cent, with all edits -> without the removed ones", "of", "count")
    for score in _SCORES:
        table.add_column(score, justify="right")
    for part, name in _PARTS.items():
        if part in summary:
            before, after = summary[part]["before"], summary[part]["after"]
            cells = (_change(before[score], after[score]) for score in _SCORES)
            table.add_row(name, str(before["edits"]), *cells)
    return table


def _change(before: dict[str, float] | None, after: dict[str, float] | None) -> str:
    if before is None or after is None:
        return ""
    return f"{before['score']:.1f} -> {after['score']:.1f}"


def _flips(summary: dict[str, Any]) -> Table:
    table = _table("probes whose success changed", "of", "probe")
    for column in ("asked", "lost", "gained"):
        table.add_column(column, justify="right")
    for part, name in _PARTS.items():
        for kind, counts in summary.get(part, {}).get("changed", {}).items():
            table.add_row(name, kind, *(str(counts[c]) for c in ("probes", "lost", "gained")))
    return table


def _layers(summary: dict[str, Any]) -> Table:
    table = _table("relative change, per cent of its norm", "layer")
    for column in ("the weight", "all that was added to it"):
        table.add_column(column, justify="right")
    for layer, change in summary["layers"].items():
        both = (change["weight_change"], change["update_change"])
        table.add_row(layer, *(f"{100.0 * value:.3g}" for value in both))
    return table


def _worst(worst: list[dict[str, Any]]) -> Table:
    table = _table("other edits that lost most", "case_id", "probe", "prompt")
    table.add_column("nats lost", justify="right")
    table.add_column("success")
    for row in worst:
        texts = (row["case_id"], row["probe"], row["prompt"])
        success = f"{_word(row['success_before'])} -> {_word(row['success_after'])}"
        shown = (escape(one_line(text, _LONGEST_PROMPT)) for text in texts)
        table.add_row(*shown, f"{row['lost']:.3f}", success)
    return table


def _word(success: bool) -> str:
    return "yes" if success else "no"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table
