"""report.html of a survey."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pipeline.report import figures_survey, tables_survey
from pipeline.report.page import Section, write_page
from pipeline.report.reading import flattened
from pipeline.report.surveyed import SETTINGS, Group, groups_of
from pipeline.report.tables import Table
from pipeline.spec import JobSpec

_TEXTS = {
    "single": "Every fact is edited alone: the unedited weights are put back after it. Reliability"
    " and generality are the shares of the edited prompt and of its paraphrases whose new answer is"
    " the model's own, token by token; locality is the share of questions beside the edit that are"
    " answered as the unedited model answers them; portability is that of questions whose answer"
    " follows from the edit.",
    "batch": "All facts of a batch are edited at once, on the unedited model.",
    "sequence": "Facts are edited one after another, or so many at once as the survey says, each"
    " time on the model that the edits before have left; scored are all edits so far.",
}


def write_survey_report(spec: JobSpec, table: pa.Table) -> Path | str:
    """Write a survey's report.html with its figures beside its table, and return where it is.

    Args:
        spec: the survey.
        table: rows of survey.parquet.

    Raises:
        InputError: the URL cannot be written.
        OSError: the directory cannot be written.
    """
    return write_page(f"{spec.name}: survey", _sections(spec, groups_of(table)), spec.place)


def _sections(spec: JobSpec, groups: list[Group]) -> Iterator[Section]:
    for number, group in enumerate(groups):
        # One pair of model and data set needs no name in the contents.
        where = f"{group.title}: " if len(groups) > 1 else ""
        for setting in group.settings():
            pictures = (
                [figures_survey.single(group, number), figures_survey.costs(group, number)]
                if setting == "single"
                else [figures_survey.curves(group, setting, number)]
            )
            yield Section(
                f"{setting}-{number}",
                f"{where}{SETTINGS[setting]}",
                pictures,
                [tables_survey.scores(group, setting)],
                [_TEXTS[setting]],
            )
        yield Section(
            f"missing-{number}",
            f"{where}What is missing",
            tables=[tables_survey.missing(group)],
        )
    yield Section("settings", "Settings", tables=[_settings(spec)])


def _settings(spec: JobSpec) -> Table:
    settings = flattened(spec.model_dump(mode="json", exclude_unset=True))
    return Table("The survey's spec as it was given", ("setting", "value"), [*settings.items()])
