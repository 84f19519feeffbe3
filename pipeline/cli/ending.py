"""What commands do once a job has ended: report, trackers, exit code."""

from pathlib import Path

import typer
from rich.console import Console

from pipeline.cli.common import EXIT_FAILED, EXIT_INPUT, print_line
from pipeline.errors import EditfleetError
from pipeline.printable import one_line
from pipeline.spec import JobSpec


def write_reports(runs: list[Path], console: Console, output: str, how: str) -> bool:
    """Write the report of finished runs; say so if that fails, for the runs themselves are whole.

    Args:
        runs: run directories, or the driver's copies of runs at URLs.
        console: where to say where it is.
        output: the directory or URL to write to.
        how: the command that writes it.
    """

    from pipeline.report.page import write_report

    try:
        page = write_report(runs, output)
    except (EditfleetError, OSError) as error:
        what = f"the job is finished, but its report could not be written: {error}"
        typer.echo(one_line(f"editfleet: {what}; `{how}` writes it"), err=True)
        return False
    print_line(console, f"report: {page}")
    return True


def log_to_trackers(runs: list[str], spec: JobSpec) -> None:
    """Log finished runs to the trackers that the spec names."""
    from pipeline.watching.trackers import track

    for run in runs:
        track(run, spec.output.trackers)


def leave(counts: list[dict[str, int]], is_reported: bool) -> None:
    """Leave with the code that says what became of the requests."""
    if not is_reported or any(count["failed"] for count in counts):
        raise typer.Exit(EXIT_FAILED)
    if any(count["rejected"] or count["conflict"] for count in counts):
        raise typer.Exit(EXIT_INPUT)
