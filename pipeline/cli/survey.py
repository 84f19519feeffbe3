"""The command that makes a survey. It decides nothing: every setting is in the spec."""

import typer

from pipeline.cli.common import (
    EXIT_FAILED,
    Overrides,
    Restart,
    SpecPath,
    app,
    print_line,
    resumable,
    spec_and_way,
)
from pipeline.printable import one_line
from pipeline.signals import raising_stopped
from pipeline.terminal import make_console


@app.command()
def survey(spec: SpecPath, overrides: Overrides = None, restart: Restart = False) -> None:
    """Compare editors on models and data sets: single edits, batches, sequences (docs/survey.md).

    Cells that are done already are not made again. Exits with 1 if a cell failed; what an editor
    cannot do is in the table, with its reason, and is no failure.
    """
    from pipeline.cluster.survey import run_survey
    from pipeline.report.survey_page import write_survey_report
    from pipeline.report.surveyed import groups_of
    from pipeline.report.tables_survey import survey_tables
    from pipeline.submitting import warn_of_temporary

    job, how_to_resume = spec_and_way(spec, overrides, restart)
    console = make_console()
    warn_of_temporary(job.run_path)
    with resumable(job, how_to_resume):
        result = run_survey(job, console=console)
    console.print(survey_tables(groups_of(result.table)))
    with raising_stopped("the survey is finished; the same command reports on it"):
        print_line(console, f"report: {write_survey_report(job, result.table)}")
    print_line(console, f"survey directory: {result.place}")
    for cell, reason in result.failed.items():
        typer.echo(one_line(f"editfleet: {cell} failed: {reason}"), err=True)
    if result.failed:
        raise typer.Exit(EXIT_FAILED)
