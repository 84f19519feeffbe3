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
_OTHER_SHARES = {
    "unchanged": "unchanged",
    "generated_match": "generated",
    "generated_exact": "generated exactly",
}
_GENERAL = {
    "perplexity": "perplexity of held-out text",
    "token_accuracy": "its tokens that are the argmax",
    "kl": "KL(unedited || edited) on neutral prompts, nats",
    "same_argmax": "same argmax there as unedited",
}
_NORMS = {"weight_norm": "norm of the weight", "update_norm": "norm of its update"}
_MOST_PROBLEMS = 20
_MOST_ROUNDS = 4

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
        if (fluency := _fluency(summary["evaluation"]["rounds"])) is not None:
            parts.append(fluency)
    if summary.get("general"):
        parts.append(_general(summary["general"]))
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
    others = [name for name in _OTHER_SHARES if _is_measured(rounds, name)]
    for column in ("success", "exact", *(_OTHER_SHARES[name] for name in others)):
        table.add_column(column, justify="right")

    def shares(entry: dict[str, Any], kind: str, *names: str) -> list[_Score | None]:
        probe = entry["probes"].get(kind, {})
        return [probe.get(name) for name in (*names, "exact", *others)]

    for score, kind in SCORES.items():
        _add_rows(table, _NAMES[score], [(e, [e[score], *shares(e, kind)]) for e in rounds])
    nothing = [None] * (1 + len(others))
    _add_rows(table, "harmonic mean (S)", [(e, [e["S"], *nothing]) for e in rounds])
    for kind in _other_kinds(rounds):
        name = escape(one_line(kind))
        _add_rows(table, name, [(e, shares(e, kind, "success")) for e in rounds])
    return table


def _is_measured(rounds: list[dict[str, Any]], name: str) -> bool:
    return any(probe.get(name) for entry in rounds for probe in entry["probes"].values())


def _fluency(rounds: list[dict[str, Any]]) -> Text | None:
    """Fluency of generation probes; None where there are none."""
    found = [entry["probes"].get("generation", {}).get("fluency") for entry in rounds]
    models = zip(_models(rounds), found, strict=True)
    said = [f"{model} {value:.2f}" for model, value in models if value is not None]
    return Text(f"fluency, bits: {', '.join(said)}") if said else None


def _general(rounds: list[dict[str, Any]]) -> Table:
    """What the rest of the model lost: a line a measure; of many rounds the first and the last."""
    rounds = rounds if len(rounds) <= _MOST_ROUNDS else [rounds[0], rounds[-1]]
    table = Table(title="the rest of the model", title_justify="left")
    table.add_column("measure")
    for name in _models(rounds):
        table.add_column(name, justify="right")
    for name, label in _GENERAL.items():
        table.add_row(label, *(_number(entry.get(name)) for entry in rounds))
    for name, label in _NORMS.items():
        for layer in rounds[0].get(name, {}):
            values = (_number(entry.get(name, {}).get(layer)) for entry in rounds)
            table.add_row(escape(one_line(f"{label}, layer {layer}")), *values)
    return table


def _models(rounds: list[dict[str, Any]]) -> list[str]:
    """What the model of each entry is called: a batch has one that is edited, a study many."""
    is_batch = all(entry["round"] <= 0 for entry in rounds)
    edited = "edited" if is_batch else "round {}"
    return ["unedited" if e["round"] < 0 else edited.format(e["round"]) for e in rounds]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _add_rows(
    table: Table, name: str, entries: list[tuple[dict[str, Any], list[_Score | None]]]
) -> None:
    """One line before the edits and one after each scored round, closed by a rule."""
    models = _models([entry for entry, _ in entries])
    for number, (model, (_, scores)) in enumerate(zip(models, entries, strict=True)):
        table.add_row("" if number else name, model, *map(_cell, scores))
    table.add_section()


def _other_kinds(rounds: list[dict[str, Any]]) -> list[str]:
    kinds = dict.fromkeys(kind for entry in rounds for kind in entry["probes"])
    return [kind for kind in kinds if kind not in (*SCORES.values(), "generation")]


def _cell(score: _Score | None) -> str:
    if score is None:
        return ""
    return f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"
