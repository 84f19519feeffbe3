"""The `editfleet` command. It decides nothing: every setting is in the job spec."""

import io
import sys

import typer

from pipeline.cli import jobs, runs, survey
from pipeline.cli.common import EXIT_FAILED, EXIT_INPUT, app
from pipeline.errors import EditfleetError, InputError
from pipeline.printable import one_line
from pipeline.signals import Stopped, raising_stopped

# Their commands are in the application from their import on.
__all__ = ["app", "jobs", "main", "runs", "survey"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 something failed, 2 the input is wrong.

    SIGINT and SIGTERM make it 130 and 143.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Where the terminal's encoding lacks a letter of a subject, it is escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        with raising_stopped("what was finished is kept"):
            app(args=arguments, standalone_mode=True)
    except InputError as error:
        typer.echo(f"editfleet: {one_line(str(error))}", err=True)
        sys.exit(EXIT_INPUT)
    except EditfleetError as error:
        typer.echo(f"editfleet: {one_line(str(error))}", err=True)
        sys.exit(EXIT_FAILED)
    except Stopped as stopped:
        typer.echo(one_line(str(stopped)), err=True)
        raise
