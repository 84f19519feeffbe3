"""What all commands have in common: the application, its arguments and its exit codes."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipeline.printable import one_line
from pipeline.signals import raising_stopped
from pipeline.spec import JobSpec, load_spec
from pipeline.terminal import choose_log_format
from pipeline.watching.logs import LogFormat

app = typer.Typer(
    help="Rewrite facts inside large language models, thousands at once, on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="Job spec (YAML).")]
RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or URL of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override a setting; may be repeated."),
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Begin anew in a new directory, RUN-2 for example.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load the unedited weights from .bin files.")
]
Round = Annotated[
    int | None,
    typer.Option("--round", help="The model as it was after this round, counted from 0."),
]

EXIT_FAILED = 1
EXIT_INPUT = 2


def spec_and_way(spec: Path, overrides: list[str] | None, restart: bool) -> tuple[JobSpec, str]:
    """The job that a command names, and what goes with the same command to resume it."""
    from pipeline.results.remote import next_free_place

    job = load_spec(spec, overrides)
    if not restart:
        return job, ""
    place = next_free_place(job.place)
    return job.at(place), f"without --restart and with --set output.path={place}"


def resumable(spec: JobSpec, how_to_resume: str) -> AbstractContextManager[None]:
    """Raise `Stopped` in the block on a signal, and say how to go on."""
    way = " ".join(filter(None, ("the same command", how_to_resume)))
    return raising_stopped(f"what was finished is kept in {spec.place}, and {way} resumes it")


def print_line(console: Console, line: str) -> None:
    """Print one line as it is, however long."""
    console.print(one_line(line), markup=False, highlight=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            "--log-format",
            envvar="EDITFLEET_LOG_FORMAT",
            help="Lines of the log: text, or json with run, round, phase, shard and worker.",
        ),
    ] = LogFormat.text,
) -> None:
    choose_log_format(log_format)
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"editfleet {installed('editfleet')}")
        raise typer.Exit
