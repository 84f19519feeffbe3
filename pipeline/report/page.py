"""report.html: one page with everything in it, and its figures as files beside it."""

import base64
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.places import below, located
from pipeline.printable import one_line
from pipeline.report import (
    figures_assess,
    figures_learning,
    figures_model,
    figures_neurons,
    figures_scores,
    figures_search,
    figures_time,
    figures_trace,
    figures_training,
    planned,
    tables,
    tables_compared,
)
from pipeline.report.arms import Arm, arms, method_name
from pipeline.report.assess_summary import check_assess, held_said
from pipeline.report.benchmarks import benchmarks
from pipeline.report.findings import Findings, find, settings_of
from pipeline.report.status import headline
from pipeline.report.style import Picture
from pipeline.report.tables import Table
from pipeline.report.trace_summary import check_trace, proposal_said
from pipeline.report.training_summary import check_training, validation_said
from pipeline.results.atomic import write_atomically
from pipeline.results.reading import Run, read
from pipeline.results.remote import writing_into

if TYPE_CHECKING:
    from jinja2 import Template

PAGE = "report.html"
PICTURES = "report"
_LONGEST_CELL = 240
_LONGEST_LABEL = 48

_Figure = Callable[[Sequence[Arm]], Picture | None]
_Table = Callable[[Sequence[tuple[str, Findings]]], Table | None]


@dataclass(frozen=True)
class Section:
    """A part of a page; what is None in it was not measured and is left out."""

    name: str
    title: str
    pictures: Sequence[Picture | None] = ()
    tables: Sequence[Table | None] = ()
    texts: Sequence[str] = field(default_factory=tuple)

    @property
    def is_empty(self) -> bool:
        return not self.texts and not any((*self.pictures, *self.tables))


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path | str:
    """Write report.html and its figures (report/*.svg, *.png), and return its path or URL.

    The page needs no other file, no network and no script. The same runs give the same bytes. Each
    file is written whole or not at all, the page last, and no file of the runs is changed.

    Args:
        runs: run directories or URLs; several are compared, a line each. Those that differ in
            their seed only are one line, with a band from the least to the greatest.
        output: the directory or URL to write to; null is the run's own, where there is one run.

    Raises:
        InputError: a directory is no run, or there are several runs and no output.
        ResultsDamagedError: a file of a run is damaged.
        OSError: the output cannot be written.
    """
    if not runs:
        raise InputError("no run to report on; name a run directory")
    if output is None and len(runs) > 1:
        raise InputError("several runs: say where to write their report with --output DIR")
    place = located(runs[0] if output is None else output)
    return write_page(*_content([read(run) for run in runs]), place)


def write_page(title: str, every: Iterable[Section], place: str | Path) -> Path | str:
    """Write report.html with these sections and their figures, and return its path or URL.

    Raises:
        InputError: the URL cannot be written.
        OSError: the directory cannot be written.
    """
    sections = [section for section in every if not section.is_empty]
    pictures = [picture for section in sections for picture in section.pictures if picture]
    page = _template().render(title=title, sections=sections)
    place = located(place)
    with writing_into(place) as directory:
        for picture in pictures:
            write_atomically(directory / PICTURES / f"{picture.name}.svg", picture.svg)
            write_atomically(directory / PICTURES / f"{picture.name}.png", picture.png)
        write_atomically(directory / PAGE, page.encode())
    return place / PAGE if isinstance(place, Path) else below(place, PAGE)


def _content(runs: Sequence[Run]) -> tuple[str, Iterator[Section]]:
    """Title and sections: of editing runs side by side, or of one job that edits nothing."""
    for run in runs:
        for group, (what, made) in _ALONE.items():
            if not _has_group(run, group):
                continue
            if len(runs) > 1:
                raise InputError(f"{run.place} is {what}; report on it alone")
            return one_line(str(run.summary["name"]), _LONGEST_LABEL), made(run)
    found = [find(run) for run in runs]
    labelled = list(zip(labels(found), found, strict=True))
    return ", ".join(label for label, _ in labelled), _sections(labelled)


def _has_group(run: Run, group: str) -> bool:
    """Whether a run's spec has a group that is null in most."""
    spec = run.manifest.get("spec")
    return isinstance(spec, dict) and spec.get(group) is not None


def _trace_sections(run: Run) -> Iterator[Section]:
    found = check_trace(run.summary)
    yield Section(
        "summary",
        "Causal tracing",
        [figures_trace.averages(found), figures_trace.by_layer(found)],
        [figures_trace.effects_table(found), figures_trace.requests_table(found)],
        [proposal_said(found.trace.proposal)],
    )
    yield Section("facts", "Single facts", figures_trace.facts(run))
    yield _own_settings(run, "trace")


def _training_sections(run: Run) -> Iterator[Section]:
    found = check_training(run.summary)
    yield Section(
        "summary",
        "Training of an editor",
        [figures_learning.curves(run)],
        [tables.request_counts(found.requests), planned.estimate_of(run)],
        [validation_said(found.training)],
    )
    yield _own_settings(run, "train", "method")


def _assess_sections(run: Run) -> Iterator[Section]:
    found = check_assess(run.summary)
    yield Section(
        "summary",
        "Facts that the model holds",
        [figures_assess.ratios(run, found.assessment)],
        [figures_assess.relations_table(found.assessment), tables.request_counts(found.requests)],
        [held_said(found.assessment)],
    )
    yield Section("facts", "Facts that it does not hold", tables=[figures_assess.least_held(run)])
    yield _own_settings(run, "assess")


def _own_settings(run: Run, *groups: str) -> Section:
    chosen = tables.settings_of_groups(settings_of(run), groups)
    return Section("settings", "Settings", tables=[chosen])


# Jobs that edit nothing: the group of settings that makes them, and their page.
_ALONE: dict[str, tuple[str, Callable[[Run], Iterator[Section]]]] = {
    "trace": ("a causal trace", _trace_sections),
    "train": ("the training of an editor", _training_sections),
    "assess": ("an assessment of facts", _assess_sections),
}


def _sections(labelled: list[tuple[str, Findings]]) -> Iterator[Section]:
    found = arms(labelled)
    yield Section(
        "end",
        "Not finished",
        tables=[tables_compared.phases(labelled)],
        texts=[
            f"{label}: {headline(findings.status)}"
            for label, findings in labelled
            if findings.status is not None
        ],
    )
    compared = tables_compared.comparison(found)
    for name, title, figures, made in _SECTIONS:
        pictures = [figure(found) for figure in figures]
        shown = [table(labelled) for table in made]
        yield Section(name, title, pictures, [compared, *shown] if name == "summary" else shown)
    for name, title, table, said in _OF_EACH_RUN:
        yield Section(
            name,
            title,
            tables=[table(label, findings) for label, findings in labelled],
            texts=[said(label, findings) for label, findings in labelled],
        )
    yield Section(
        "settings", "Settings", tables=[tables.origins(labelled), tables.settings(labelled)]
    )


def _problems_said(label: str, findings: Findings) -> str:
    if findings.problems:
        return f"{label}: all requests, with status and reason, are in edits/."
    return f"{label}: every request was applied."


def _neighbours_said(label: str, findings: Findings) -> str:
    found = findings.neighbours
    if found is None:
        return f"{label}: neighbours were not scored both before and after the edits."
    return (
        f"{label}: of {found.known} neighbourhood probes that the unedited model got right,"
        f" {found.flipped} are wrong after the edits."
    )


_SECTIONS: Sequence[tuple[str, str, Sequence[_Figure], Sequence[_Table]]] = (
    ("summary", "Summary", [figures_scores.scores], [tables.scores, tables.requests]),
    (
        "forgetting",
        "Forgetting",
        [figures_scores.against_rounds, figures_scores.own_by_round, figures_scores.against_age],
        [tables.ages],
    ),
    ("rest", "The rest of the model", [figures_model.rest_of_the_model], [benchmarks]),
    (
        "weights",
        "Updates and weights",
        [figures_model.update_sizes, figures_model.norms_by_round],
        [tables.updates],
    ),
    (
        "values",
        "Value search",
        [figures_search.value_search, figures_search.search_by_round],
        [tables.value_search],
    ),
    ("neurons", "Neurons", [figures_neurons.by_layer], []),
    ("patches", "Patches", [], [tables.patches]),
    ("training", "Training", [figures_training.loss_by_epoch], []),
    (
        "time",
        "Time and workers",
        [figures_time.seconds, figures_time.seconds_by_round],
        [tables.seconds, tables.round_seconds, tables.workers, planned.estimates],
    ),
)
_OF_EACH_RUN = (
    ("problems", "Failures and conflicts", tables.problems, _problems_said),
    ("neighbours", "The worst neighbours", tables.neighbours, _neighbours_said),
)


def labels(found: Sequence[Findings]) -> list[str]:
    """What each run is called: its name, and as far as names are shared its method and seed.

    Where that tells them not apart either, it is their directory.
    """
    names = [findings.recorded.name for findings in found]
    methods = [method_name(findings) for findings in found]
    seeds = [f"seed {findings.settings.get('seed', '')}" for findings in found]
    choices = ([names], [names, methods], [names, seeds], [methods, seeds], [names, methods, seeds])
    for parts in choices:
        short = [one_line(", ".join(label), _LONGEST_LABEL) for label in zip(*parts, strict=True)]
        if max(Counter(short).values()) == 1:
            return short
    return [
        f"{number}: {one_line(findings.run.path.name, _LONGEST_LABEL)}"
        for number, findings in enumerate(found, start=1)
    ]


@cache
def _template() -> "Template":
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        """Texts of a run come from anyone: none may be endless, or steer the page."""
        return value if isinstance(value, Markup) else one_line(str(value))

    environment = Environment(
        loader=PackageLoader("pipeline.report", "templates"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["as_source"] = _as_source
    environment.filters["short"] = lambda cell: one_line(cell, _LONGEST_CELL)
    return environment.get_template("report.html")


def _as_source(svg: bytes) -> Any:
    """A picture as an address of its own content. As `<img>` it can neither run nor fetch."""
    from markupsafe import Markup

    return Markup("data:image/svg+xml;base64," + base64.b64encode(svg).decode())
