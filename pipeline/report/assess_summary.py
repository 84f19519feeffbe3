"""The summary of an assessment as tables for a terminal or a log."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pipeline.printable import one_line
from pipeline.results.recorded import check_recorded

_SHOWN = 40
_Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class AssessedRelation(_Part):
    """How many facts of a relation are held."""

    facts: _Count
    held: _Count


class Assessment(AssessedRelation):
    """What an assessment found over all facts."""

    threshold: float
    median_score: float | None
    relations: dict[str, AssessedRelation]


class AssessSummary(_Part):
    """summary.json of an assessment."""

    name: str
    requests: dict[str, int]
    assessment: Assessment


def check_assess(summary: dict[str, Any]) -> AssessSummary:
    """Check what summary.json of an assessment holds.

    Raises:
        ResultsDamagedError: it is another thing.
    """
    return check_recorded(summary, AssessSummary, "summary.json")


def assess_tables(summary: dict[str, Any]) -> RenderableType:
    """Facts that the model holds, of all and of each relation, those it holds least first.

    Raises:
        ResultsDamagedError: it is not an assessment's summary.
    """
    found = check_assess(summary)
    all_facts = found.assessment
    table = Table(title=f"{escape(one_line(found.name))}: facts that the model holds")
    for name in ("relation", "facts", "held", "wrong", "held, %"):
        table.add_column(name, justify="left" if name == "relation" else "right")
    ordered = by_share(all_facts)
    for name, relation in ordered[:_SHOWN]:
        table.add_row(escape(one_line(name)) or "(none)", *cells(relation))
    if len(ordered) > _SHOWN:
        table.add_row(f"{len(ordered) - _SHOWN} more")
    table.add_section()
    table.add_row("all", *cells(all_facts))
    counts = ", ".join(f"{count} {status}" for status, count in found.requests.items() if count)
    return Group(table, Text(one_line(f"requests: {counts}; {held_said(all_facts)}")))


def held_said(found: Assessment) -> str:
    """What held means, and the median, in a sentence."""
    said = f"held is a ratio above {found.threshold:g}"
    if found.median_score is not None:
        said += f"; the median ratio is {found.median_score:.3g}"
    return said


def by_share(found: Assessment) -> list[tuple[str, AssessedRelation]]:
    """The relations, those of which the model holds least first."""
    return sorted(found.relations.items(), key=lambda pair: (_share(pair[1]), pair[0]))


def _share(relation: AssessedRelation) -> float:
    return relation.held / max(1, relation.facts)


def cells(relation: AssessedRelation) -> tuple[str, str, str, str]:
    """Facts, those held, those not, and the share that is held in per cent, as text."""
    wrong = relation.facts - relation.held
    return str(relation.facts), str(relation.held), str(wrong), f"{100 * _share(relation):.1f}"
