"""Commands that take a run directory, and those of the embedded model."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import EXIT_FAILED, AllowPickle, Round, RunPlace, app, print_line
from pipeline.errors import InputError
from pipeline.printable import one_line
from pipeline.signals import raising_stopped
from pipeline.terminal import make_console

factworld_app = typer.Typer(help="The embedded default model and its world.", no_args_is_help=True)
app.add_typer(factworld_app, name="factworld")


@app.command()
def summary(run: RunPlace) -> None:
    """Print a run's summary again."""
    from pipeline.report.assess_summary import assess_tables
    from pipeline.report.study_summary import study_tables
    from pipeline.report.summary import summary_tables
    from pipeline.report.trace_summary import trace_tables
    from pipeline.report.training_summary import training_tables
    from pipeline.results import read

    found = read(run).summary
    alone = {"training": training_tables, "trace": trace_tables, "assessment": assess_tables}
    for name, tables in alone.items():
        if name in found:
            make_console().print(tables(found))
            return
    make_console().print(study_tables(found) if "current" in found else summary_tables(found))


@app.command()
def status(
    run: RunPlace,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every file against its checksum.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on showing it until the run ends.")
    ] = False,
) -> None:
    """Say what is done of a run, what is left, what failed, and who is working on it.

    With --follow it exits with 1 if the run ends before it is finished.
    """
    from pipeline.report.status import print_status, run_status

    if follow:
        if verify:
            raise InputError("--follow and --verify: verify a run once it has ended")
        _follow(run)
        return
    found = run_status(run, verify=verify)
    print_status(found, make_console())
    if found.damaged:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def export(
    run: RunPlace,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the model.")],
    round: Round = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write adapters into the model's own weights.")
    ] = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write a run's edited model with save_pretrained, from its stored updates.

    Adapters are written beside it, for pipeline.load_adapter, unless they are merged.
    """
    from pipeline.exporting import export_model

    export_model(run, directory, round=round, merge=merge, allow_pickle=allow_pickle)
    typer.echo(one_line(f"edited model in {directory}"))


@app.command()
def unedit(
    run: RunPlace,
    case_id: Annotated[
        list[str],
        typer.Option("--case-id", metavar="ID", help="An edit to take out; may be repeated."),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="Where to write model and comparison.")
    ],
    covariance: Annotated[
        Path | None,
        typer.Option(
            "--covariance", metavar="DIR", help="Where the run's covariances are, if they moved."
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Take edits out of a finished run again, and say what else that changed (docs/unedit.md)."""
    from pipeline.report.unedit_summary import unedit_tables
    from pipeline.unediting import unedit as take_out

    console = make_console()
    result = take_out(
        run, case_id, output, covariance=covariance, allow_pickle=allow_pickle, console=console
    )
    console.print(unedit_tables(result.summary))
    print_line(console, f"model, unedit.json and unedit.parquet in {result.path}")


@app.command()
def harness(
    run: RunPlace,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="TASK,...", help="Tasks, groups or tags of lm-eval.")
    ],
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path", metavar="DIR", help="Tasks of your own; functions they name are run."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Questions a task; else all.")
    ] = None,
    round: Round = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions at once.")] = 16,
    output: Annotated[
        str | None,
        typer.Option("--output", metavar="DIR", help="Where to write; else RUN/harness."),
    ] = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Score both models with lm-evaluation-harness, an optional extra (docs/sequential.md)."""
    from pipeline.harness import run_harness
    from pipeline.report.benchmarks import benchmark_table

    console = make_console()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    rows = run_harness(
        run,
        names,
        include_path=include_path,
        limit=limit,
        round=round,
        batch_size=batch_size,
        output=output,
        allow_pickle=allow_pickle,
    )
    console.print(benchmark_table(rows))


@app.command()
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run directories, or URLs of runs.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output", metavar="DIR", help="Where to write; needed for several runs, else RUN."
        ),
    ] = None,
) -> None:
    """Write report.html with its figures: of one run, or of several side by side."""
    from pipeline.report.page import write_report

    typer.echo(one_line(f"report: {write_report(runs, output)}"))


@app.command()
def track(
    run: RunPlace,
    names: Annotated[
        list[str], typer.Argument(metavar="TRACKER...", help="mlflow, wandb, or both.")
    ],
) -> None:
    """Log a finished run's settings, scores and report to MLflow or Weights & Biases."""
    from pipeline.watching.trackers import track as track_run

    track_run(run, names)
    typer.echo(one_line(f"{run} is logged to {' and '.join(names)}"))


@app.command()
def timeline(
    run: RunPlace,
    output: Annotated[Path, typer.Argument(metavar="OUT.json", help="Where to write it.")],
) -> None:
    """Write a run's phases and calls to workers as a Chrome trace, for ui.perfetto.dev."""
    from pipeline.watching.timeline import write_timeline

    count = write_timeline(run, output)
    typer.echo(one_line(f"timeline of {count} events in {output}"))


@factworld_app.command()
def build(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the model.")],
    seed: Annotated[int, typer.Option(help="Seed of the world and the training.")] = 0,
) -> None:
    """Generate the world, train the model until it knows its facts, and save it."""
    from pipeline.factworld.build import build as build_model

    report = build_model(directory, seed=seed, progress=typer.echo)
    typer.echo(str(report))


def _follow(run: str) -> None:
    from pipeline.watching.follow import follow

    with raising_stopped(f"nobody looks at {run} any more; the run itself goes on"):
        status = follow(run, make_console())
    if status.state != "finished":
        raise typer.Exit(EXIT_FAILED)
