"""Entry points of the jobs: one batch of edits, a study of many rounds, covariances."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cluster.covariance import Covariances, ensure_covariances
from pipeline.cluster.engine import Engine, InProcessEngine
from pipeline.cluster.gpus import settled_here
from pipeline.cluster.plan import Plan, make_plan, settle_spec
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.resume import drop_unsound, is_complete, open_earlier, require_same_job
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.study import Study
from pipeline.errors import InputError
from pipeline.methods import check_batch
from pipeline.requests import EditRequest
from pipeline.results.driving import driving
from pipeline.results.manifest import read_begun
from pipeline.results.remote import next_free_place
from pipeline.results.store import RunStore
from pipeline.spec import JobSpec
from pipeline.watching import logs
from pipeline.watching.watch import watch_of


@dataclass(frozen=True)
class RunResult:
    """What a finished job leaves.

    Attributes:
        path: the run directory; of a run at a URL, the driver's copy of it.
        summary: what summary.json holds.
        place: where the run is: the directory, or the URL.
    """

    path: Path
    summary: dict[str, Any]
    place: str

    @property
    def counts(self) -> dict[str, int]:
        """Requests by status: applied, rejected, conflict, failed."""
        return dict(self.summary["requests"])


def run_batch_edit(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None = None,
    *,
    restart: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Edit all requests in one batch and leave a run directory behind.

    A run that the directory holds already is gone on with, if it is of the same job: nothing that
    it holds is computed again, and the result is the same bits as without the interruption. If it
    is complete, its summary is returned.

    Args:
        spec: the job; settings left null are taken from the model's published defaults.
        requests: edit requests given in memory; null reads `spec.requests`.
        restart: begin anew in the first of PATH, PATH-2, PATH-3, ... that is free.
        console: where to show progress; null is silent.

    Returns:
        The run directory and its summary.

    Raises:
        InputError: the spec, the requests or the model are wrong, or not those that the run was
            begun with, or another driver works on it; nothing was written.
        JobFailedError: the job could not go on; the run directory holds what was finished.
        ResultsDamagedError: the run's manifest is damaged.
    """
    _require_one_study(spec)
    if spec.rounds is not None:
        raise InputError(
            "rounds: the spec is that of a sequential study; run it with `editfleet sequential`, or"
            " set rounds to null to edit all requests in one batch"
        )
    return _run(spec, requests, restart, console)


def run_sequential(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None = None,
    *,
    restart: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Edit round after round, each on the model that the round before left, and score as asked.

    A study that the directory holds already is gone on with, as `run_batch_edit` does: at its
    round, at the first shard or layer that is missing, with the same bits.

    Args:
        spec: the job, with `rounds`; settings left null are taken from the model's defaults.
        requests: edit requests given in memory; null reads `spec.requests`.
        restart: begin anew in the first of PATH, PATH-2, PATH-3, ... that is free.
        console: where to show progress; null is silent.

    Raises:
        InputError, JobFailedError, ResultsDamagedError: as of `run_batch_edit`.
    """
    _require_one_study(spec)
    if spec.rounds is None:
        raise InputError(
            "rounds: the spec of a sequential study says how it is cut into rounds; give"
            " rounds.size, or run `editfleet edit` to edit all requests in one batch"
        )
    return _run(spec, requests, restart, console)


def _require_one_study(spec: JobSpec) -> None:
    """Check that a spec is of one batch or study (InputError)."""
    if spec.survey is not None:
        raise InputError(
            "survey: the spec is of many studies; run it with `editfleet survey` (run_survey), or"
            " set survey to null"
        )
    if spec.compare is not None:
        raise InputError(
            "compare: the spec is of several studies; run it with `editfleet sequential`"
            " (run_comparison), or set compare to null"
        )
    if spec.trace is not None:
        raise InputError(
            "trace: the spec is that of causal tracing; run it with `editfleet trace`, or set trace"
            " to null to edit"
        )
    if spec.train is not None:
        raise InputError(
            "train: the spec is that of a training; run it with `editfleet train`, or set train to"
            " null to edit"
        )
    if spec.assess is not None:
        raise InputError(
            "assess: the spec is that of an assessment; run it with `editfleet assess`, or set"
            " assess to null to edit"
        )


def _run(
    spec: JobSpec, requests: Sequence[EditRequest] | None, restart: bool, console: Console | None
) -> RunResult:
    if restart:
        spec = spec.at(next_free_place(spec.place))
    progress = PhaseProgress(console)
    with logs.about(run=spec.place), driving(spec.run_path, spec.url) as progress.mirror:
        store = open_earlier(spec)
        plan = make_plan(spec, requests)
        if (complete := check_job(plan, store, progress)) is not None:
            return complete
        progress.watch = watch_of(plan.spec)
        with progress.phase("start", 1):
            engine = start_engine(plan.spec)
        try:
            scheduler = make_scheduler(engine, plan.spec)
            study = Study(plan, engine, scheduler, progress, store)
            return RunResult(plan.spec.run_path, study.run(), plan.spec.place)
        finally:
            engine.close()


def check_job(plan: Plan, store: RunStore | None, progress: PhaseProgress) -> RunResult | None:
    """Check a job before anything is started for it; return its result if it is complete.

    Args:
        plan: what to do.
        store: the run that has begun in its directory, if any.
        progress: takes up the seconds of that run.

    Raises:
        InputError: the plan cannot be carried out, or is another than the run's.
    """
    if plan.spec.rolls_back and plan.spec.output.save_model:
        raise InputError(
            "output.save_model: every round is rolled back (rounds.rollback), so no model holds the"
            " edits; `editfleet export RUN DIR --round N` writes that of a round"
        )
    rounds = range(len(plan.rounds.shards))
    check_batch(plan.spec.method, max(len(plan.rounds.requests(round)) for round in rounds))
    if store is None:
        return None
    require_same_job(store, plan)
    dropped = drop_unsound(store, plan)
    if not dropped and is_complete(store, plan):
        progress.say(f"{store.place} is complete; nothing is left to do")
        return RunResult(store.path, store.read_json("summary.json"), store.place)
    progress.say(f"{store.place}: going on with the run that was begun")
    progress.seconds.update(read_begun(store).seconds)
    return None


def run_covariance(spec: JobSpec, *, console: Console | None = None) -> Covariances:
    """Compute the covariance of every edited layer, or find it already there.

    Raises:
        InputError: the spec, the corpus or the model is wrong.
        FingerprintMismatchError: `covariance.path` holds one that was made for something else.
    """
    _, spec, _ = settle_spec(spec)
    progress = PhaseProgress(console)
    with progress.phase("start", 1):
        engine = start_engine(spec)
    try:
        scheduler = make_scheduler(engine, spec)
        return ensure_covariances(spec, scheduler, scheduler.call("describe"), progress)
    finally:
        engine.close()


def start_engine(spec: JobSpec) -> Engine:
    """Start the workers that a resolved spec asks for."""
    if spec.cluster.engine == "in_process":
        return InProcessEngine(settled_here([spec])[0])
    # Ray is imported only where it is used: the core and this engine run without it.
    from pipeline.cluster.ray_engine import RayEngine

    return RayEngine(spec)


def make_scheduler(engine: Engine, spec: JobSpec, studies: int = 1, place: int = 0) -> Scheduler:
    """A scheduler over an engine.

    Args:
        studies: how many share the workers, so that calls wait for others'.
        place: the study's among them.
    """
    cluster = spec.cluster
    timeout = cluster.call_timeout_seconds
    return Scheduler(
        engine,
        cluster.max_retries,
        cluster.stall_seconds * studies,
        None if timeout is None else timeout * studies,
        place % engine.num_workers,
    )
