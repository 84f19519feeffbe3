"""Commands that take a job spec. They decide nothing: every setting is in the spec."""

from pathlib import Path
from typing import Annotated

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
from pipeline.cli.ending import leave, log_to_trackers, write_reports
from pipeline.printable import one_line
from pipeline.signals import raising_stopped
from pipeline.spec import JobSpec, load_spec
from pipeline.terminal import make_console


@app.command()
def edit(
    spec: SpecPath,
    overrides: Overrides = None,
    save_model: Annotated[
        bool, typer.Option("--save-model", help="Also write the edited model to RUN/model.")
    ] = False,
    restart: Restart = False,
) -> None:
    """Edit all requests in one batch, evaluate, and leave a run directory behind.

    A run that is there already is gone on with: what is finished is not computed again.
    """
    _edit(*spec_and_way(spec, _saving(overrides, save_model), restart))


@app.command()
def sequential(
    spec: SpecPath,
    overrides: Overrides = None,
    save_model: Annotated[
        bool, typer.Option("--save-model", help="Also write the last round's model to RUN/model.")
    ] = False,
    restart: Restart = False,
) -> None:
    """Edit round after round and score as the spec's `rounds` says (docs/sequential.md).

    A study that is there already is gone on with, at its round. A spec with `compare` is of several
    studies, which run side by side.
    """
    job, how_to_resume = spec_and_way(spec, _saving(overrides, save_model), restart)
    if job.compare is None:
        _edit(job, how_to_resume, is_study=True)
    else:
        _compare(job, how_to_resume)


@app.command()
def submit(
    spec: SpecPath,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Job server of the cluster.")
    ] = "http://127.0.0.1:8265",
    study: Annotated[bool, typer.Option("--study", help="As `editfleet sequential`.")] = False,
    working_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="What is uploaded; SPEC lies in it.")
    ] = Path(),
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not follow the job's log to its end.")
    ] = False,
    restart: Restart = False,
) -> None:
    """Run the job on a Ray cluster, print its log and exit as it does (docs/cluster.md)."""
    from pipeline.submitting import follow
    from pipeline.submitting import submit as submit_job

    make_console()
    job = submit_job(
        spec,
        overrides or [],
        address=address,
        working_dir=working_dir,
        is_study=study,
        restart=restart,
    )
    how = f"`{job.command('logs', '--follow')}` follows it, `{job.command('stop')}` ends it"
    typer.echo(f"submitted {job.id}: {how}", err=True)
    if no_wait:
        return
    with raising_stopped(f"the job goes on: {how}"):
        code = follow(job, lambda text: typer.echo(text, nl=False))
    if code:
        typer.echo(f"editfleet: {job.id} ended with exit code {code}", err=True)
    raise typer.Exit(code)


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Run the main job on the embedded model: 200 facts, two workers, about a minute."""
    from pipeline.results.place import next_free

    path = next_free(Path("runs") / "quickstart")
    settings = ["name=quickstart", "requests.limit=200", "cluster.workers=2"]
    spec = load_spec(None, [*settings, f"output.path={path}", *(overrides or [])])
    _edit(spec, f"with --set output.path={spec.place}")


@app.command()
def covariance(spec: SpecPath, overrides: Overrides = None) -> None:
    """Compute the covariance of every edited layer, or find it already there."""
    from pipeline.cluster.run import run_covariance

    console = make_console()
    result = run_covariance(load_spec(spec, overrides), console=console)
    for layer, count in sorted(result.tokens.items()):
        size = len(result.matrices[layer])
        console.print(f"layer {layer}: {size} x {size} from {count} tokens", highlight=False)
    print_line(console, f"in {result.directory}")


@app.command()
def trace(spec: SpecPath, overrides: Overrides = None, restart: Restart = False) -> None:
    """Trace facts causally: which states carry them, and so which layers to edit.

    Nothing is edited. A trace that is there already is gone on with.
    """
    from pipeline.cluster.tracing import run_trace
    from pipeline.report.trace_summary import trace_tables

    job, how_to_resume = spec_and_way(spec, overrides, restart)
    console = make_console()
    with resumable(job, how_to_resume):
        result = run_trace(job, console=console)
    console.print(trace_tables(result.summary))
    how = f"editfleet report {result.place}"
    with raising_stopped(f"the run is finished; `{how}` reports on it"):
        is_reported = write_reports([result.path], console, result.place, how)
    print_line(console, f"run directory: {result.place}")
    leave([result.counts], is_reported)


@app.command()
def train(spec: SpecPath, overrides: Overrides = None, restart: Restart = False) -> None:
    """Train the editor of a method that needs one (docs/training.md), and leave it in RUN/editor.

    A training that is there already goes on from its last checkpoint.
    """
    from pipeline.cluster.learning import run_training
    from pipeline.report.training_summary import training_tables

    job, how_to_resume = spec_and_way(spec, overrides, restart)
    console = make_console()
    with resumable(job, how_to_resume):
        result = run_training(job, console=console)
    console.print(training_tables(result.summary))
    how = f"editfleet report {result.place}"
    with raising_stopped(f"the run is finished; `{how}` reports on it"):
        is_reported = write_reports([result.path], console, result.place, how)
    print_line(console, f"run directory: {result.place}")
    leave([result.counts], is_reported)


@app.command()
def assess(spec: SpecPath, overrides: Overrides = None, restart: Restart = False) -> None:
    """Find which facts the unedited model holds, and which wrongly (docs/assess.md).

    Nothing is edited. An assessment that is there already is gone on with.
    """
    from pipeline.cluster.assessing import run_assess
    from pipeline.report.assess_summary import assess_tables

    job, how_to_resume = spec_and_way(spec, overrides, restart)
    console = make_console()
    with resumable(job, how_to_resume):
        result = run_assess(job, console=console)
    console.print(assess_tables(result.summary))
    print_line(console, f"run directory: {result.place}")
    leave([result.counts], True)


@app.command()
def plan(
    spec: SpecPath,
    overrides: Overrides = None,
    gflops: Annotated[
        float | None,
        typer.Option(
            "--gflops", min=1e-3, help="GFLOP/s of a worker in matrix products; else measured here."
        ),
    ] = None,
    reducer_gflops: Annotated[
        float | None,
        typer.Option(
            "--reducer-gflops",
            min=1e-3,
            help="GFLOP/s of the reducer in float64; else as a worker's processors.",
        ),
    ] = None,
    steps: Annotated[
        float | None, typer.Option("--steps", min=1, help="Steps of a value search, else guessed.")
    ] = None,
    worker_memory: Annotated[
        float | None,
        typer.Option(
            "--worker-memory",
            min=0,
            help="GB of a worker, or a GPU of it; else what is free.",
        ),
    ] = None,
    gigabits: Annotated[
        float, typer.Option("--gigabits", min=1e-3, help="Gbit/s of a node's link.")
    ] = 10.0,
    save: Annotated[
        bool, typer.Option("--save", help="Keep it as RUN/plan.json, for the run's report.")
    ] = False,
) -> None:
    """Say what a job edits, and estimate its time, memory and bytes moved; no weights are loaded.

    A spec with `compare` is planned study by study, one with `survey` cell by cell, one with
    `train` as a training. Exits with 1 where a worker has less memory than it needs (docs/plan.md).
    """
    from pipeline.planning.job import plan_job
    from pipeline.planning.memory import worker_share
    from pipeline.report.job_plan import job_tables
    from pipeline.report.plan import shortage
    from pipeline.results.planned import write_estimate

    rates = {"rate": gflops, "reducer_rate": reducer_gflops}
    planned = plan_job(
        load_spec(spec, overrides),
        steps=steps,
        gigabits=gigabits,
        **{name: None if given is None else given * 1e9 for name, given in rates.items()},
    )
    console = make_console()
    console.print(job_tables(planned))
    for study, estimate in planned.studies if save else ():
        print_line(console, f"plan: {write_estimate(study.spec.place, estimate)}")
    has = worker_share(planned.spec) if worker_memory is None else worker_memory * 1e9
    if has is not None and (problem := shortage(planned.memory, has)):
        typer.echo(one_line(f"editfleet: {problem}"), err=True)
        raise typer.Exit(EXIT_FAILED)


def _saving(overrides: list[str] | None, save_model: bool) -> list[str]:
    return [*(overrides or []), *(["output.save_model=true"] if save_model else [])]


def _edit(spec: JobSpec, how_to_resume: str, *, is_study: bool = False) -> None:
    from pipeline.cluster.run import run_batch_edit, run_sequential
    from pipeline.report.study_summary import study_tables
    from pipeline.report.summary import problem_lines, summary_tables
    from pipeline.results import read
    from pipeline.submitting import warn_of_temporary
    from pipeline.watching.trackers import require_trackers

    console = make_console()
    require_trackers(spec.output.trackers)
    warn_of_temporary(spec.run_path)
    with resumable(spec, how_to_resume):
        result = (run_sequential if is_study else run_batch_edit)(spec, console=console)
    console.print((study_tables if is_study else summary_tables)(result.summary))
    for line in problem_lines(read(result.path).edits().to_pylist()):
        print_line(console, line)
    how = f"editfleet report {result.place}"
    with raising_stopped(f"the run is finished; `{how}` reports on it"):
        is_reported = write_reports([result.path], console, result.place, how)
        log_to_trackers([result.place], spec)
    print_line(console, f"run directory: {result.place}")
    leave([result.counts], is_reported)


def _compare(spec: JobSpec, how_to_resume: str) -> None:
    from pipeline.cluster.comparison import run_comparison
    from pipeline.report.study_summary import comparison_table
    from pipeline.report.summary import problem_lines
    from pipeline.results import read
    from pipeline.submitting import warn_of_temporary
    from pipeline.watching.trackers import require_trackers

    console = make_console()
    require_trackers(spec.output.trackers)
    warn_of_temporary(spec.run_path)
    with resumable(spec, how_to_resume):
        results = run_comparison(spec, console=console)
    runs = [result.path for result in results]
    console.print(comparison_table({result.path.name: result.summary for result in results}))
    for line in problem_lines(read(runs[0]).edits().to_pylist()):
        print_line(console, line)
    places = [result.place for result in results]
    how = f"editfleet report {' '.join(places)} --output {spec.place}"
    with raising_stopped(f"the studies are finished; `{how}` reports on them"):
        is_reported = write_reports(runs, console, spec.place, how)
        log_to_trackers(places, spec)
    for place in places:
        print_line(console, f"run directory: {place}")
    leave([result.counts for result in results], is_reported)
