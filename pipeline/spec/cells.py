"""The cells that a survey is made of: each an ordinary study with a spec of its own."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal

from pipeline.errors import InputError
from pipeline.places import below
from pipeline.spec.job import JobSpec
from pipeline.spec.loading import parse_spec
from pipeline.spec.survey import SurveySpec
from pipeline.spec.variants import merged, updated

CellKind = Literal["single", "batch", "sequence"]

_LABEL = "label"
# What an entry of a model or a data set may not change: it is the survey's, or the cell's.
_NOT_OF_AN_ENTRY = ("name", "cluster", "output", "rounds", "compare", "trace", "survey")

# What a survey asks unless its spec says otherwise.
_UNLESS_SAID: dict[str, Any] = {
    "evaluation": {
        "probes": ["rewrite", "paraphrase", "neighborhood", "locality", "portability"],
        "unchanged": ["locality", "neighborhood"],
        "baseline": False,
    },
    "output": {"on_divergence": "keep"},
}


@dataclass(frozen=True)
class Cell:
    """One run of a survey.

    Attributes:
        model, dataset, editor: labels.
        kind: how the facts are edited.
        sizes: after how many edits it is scored; a sequence has several.
        spec: the study; its run directory is RUN/model/dataset/editor/name.
    """

    model: str
    dataset: str
    editor: str
    kind: CellKind
    sizes: tuple[int, ...]
    spec: JobSpec

    @property
    def name(self) -> str:
        """The last name of its directory: single, batch-100 or sequence."""
        return f"batch-{self.sizes[0]}" if self.kind == "batch" else self.kind

    @property
    def label(self) -> str:
        """What messages call it."""
        return "/".join((self.model, self.dataset, self.editor, self.name))

    @property
    def edits(self) -> int:
        """How many edits it makes."""
        return self.sizes[-1]

    def limited_to(self, count: int) -> "Cell | None":
        """The same with the sizes that so many requests suffice for; None if for none of them."""
        sizes = tuple(size for size in self.sizes if size <= count)
        if not sizes:
            return None
        found = replace(self, sizes=sizes)
        return replace(found, spec=_with_rounds(self.spec, found, _rounds_of(self.spec)))


def survey_cells(spec: JobSpec) -> list[Cell]:
    """All cells that `spec.survey` asks for: by model, data set and editor, the small ones first.

    Raises:
        InputError: an entry's settings are wrong, or two have the same label.
    """
    survey = spec.survey
    assert survey is not None, "the spec is of no survey"
    given = spec.model_dump(mode="json", exclude_unset=True)
    base = updated(_UNLESS_SAID, given) | {"survey": None}
    found = []
    for model, with_model in _entries(base, survey.models, "models"):
        for dataset, with_both in _entries(with_model, survey.datasets, "datasets"):
            plain = parse_spec({**with_both, "rounds": None}, "survey")
            editors = [
                merged(plain, changes, f"survey.editors[{place}]")
                for place, changes in enumerate(survey.editors)
            ]
            _require_apart([editor.name for editor in editors], "editors")
            for editor in editors:
                named = Cell(model, dataset, editor.name, "single", (1,), editor)
                found += list(_cells_of(named, spec, survey))
    return found


def _cells_of(editor: Cell, spec: JobSpec, survey: SurveySpec) -> Iterator[Cell]:
    """The cells of an editor on a model and a data set."""
    asked: list[tuple[CellKind, Sequence[int]]] = []
    if survey.single is not None:
        asked.append(("single", [survey.single.facts]))
    if survey.batch is not None:
        asked += [("batch", [size]) for size in survey.batch.sizes]
    if survey.sequence is not None:
        asked.append(("sequence", survey.sequence.sizes))
    common = {} if spec.rounds is None else spec.rounds.model_dump(exclude_unset=True)
    for kind, sizes in asked:
        cell = replace(editor, kind=kind, sizes=tuple(sizes))
        place = spec.place
        for name in (cell.model, cell.dataset, cell.editor, cell.name):
            place = below(place, name)
        at_once = survey.sequence.rounds_of if survey.sequence is not None else 1
        yield replace(cell, spec=_with_rounds(editor.spec.at(place), cell, at_once, common))


def _with_rounds(
    spec: JobSpec, cell: Cell, at_once: int, common: dict[str, Any] | None = None
) -> JobSpec:
    """The spec with the rounds of its cell."""
    if common is None:
        assert spec.rounds is not None
        common = spec.rounds.model_dump(exclude_unset=True)
    order = {"order": common["order"]} if "order" in common else {}
    rounds: dict[str, Any]
    match cell.kind:
        case "single":
            rounds = {**order, "size": 1, "count": cell.edits, "rollback": True}
            rounds |= {"evaluate_every": 1, "evaluate": ["current"]}
        case "batch":
            rounds = {**order, "size": cell.edits, "count": 1, "evaluate": ["current"]}
        case "sequence":
            rounds = {"evaluate": ["current", "all_past"], **common, "size": at_once}
            rounds["count"] = cell.edits // at_once
            rounds["evaluate_after"] = [size // at_once - 1 for size in cell.sizes]
    content = spec.model_dump(mode="json", exclude_unset=True)
    return parse_spec({**content, "rounds": rounds}, "survey")


def _rounds_of(spec: JobSpec) -> int:
    assert spec.rounds is not None
    return spec.rounds.size


def _entries(
    base: dict[str, Any], entries: Sequence[dict[str, Any]], name: str
) -> list[tuple[str, dict[str, Any]]]:
    """Each entry's label, and the settings with its own put over them."""
    found = []
    for place, entry in enumerate(entries):
        where = f"survey.{name}[{place}]"
        changes = {group: value for group, value in entry.items() if group != _LABEL}
        if odd := [group for group in changes if group in _NOT_OF_AN_ENTRY]:
            raise InputError(f"{where}: {odd[0]} is the same for all; set it for the whole spec")
        content = updated(base, changes)
        spec = parse_spec({**content, "rounds": None}, where)
        path = spec.model.path if name == "models" else spec.requests.path
        label = str(entry.get(_LABEL, PurePath(path).stem))
        parse_spec({"name": label}, f"{where}.{_LABEL}")
        found.append((label, content))
    _require_apart([label for label, _ in found], name)
    return found


def _require_apart(labels: Sequence[str], name: str) -> None:
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise InputError(
            f"survey.{name}: several are called {twice[0]!r}; give each a label of its own"
        )
