"""The job of causal tracing: facts in shards to the workers, a part of trace/ a shard."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from pipeline.cluster.observing import Observation, observe, without_editing
from pipeline.cluster.plan import Plan
from pipeline.cluster.run import RunResult
from pipeline.cluster.scheduler import Arguments, Scheduler
from pipeline.requests import EditRequest
from pipeline.results.store import RunStore
from pipeline.spec import JobSpec, TraceSpec
from pipeline.tracing.effects import summarise_trace


def run_trace(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None = None,
    *,
    restart: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Trace the facts of all requests on the unedited model and leave a run directory behind.

    The fact is a request's prompt and `target_true`. A run that the directory holds already is gone
    on with, if it is of the same job, to the same bits.

    Args:
        spec: the job; without `trace` it is traced by that group's defaults. Settings of editing
            have no say.
        requests: edit requests given in memory; null reads `spec.requests`.
        restart: begin anew in the first of PATH, PATH-2, PATH-3, ... that is free.
        console: where to show progress; null is silent.

    Raises:
        InputError: the spec, the requests or the model are wrong, or not those that the run was
            begun with, or another driver works on it; nothing was written.
        JobFailedError: the job could not go on; the run directory holds what was finished.
        ResultsDamagedError: the run's manifest is damaged.
    """
    spec = without_editing(spec, "tracing", trace=spec.trace or TraceSpec(), assess=None)
    what = Observation(
        "trace", "traced", lambda _: None, _arguments, lambda _, table: summarise_trace(table)
    )
    return observe(spec, requests, what, restart=restart, console=console)


def _arguments(plan: Plan, scheduler: Scheduler, store: RunStore) -> Arguments:
    """With the noise's standard deviation: of the subjects' embeddings, times `noise_scale`."""
    assert plan.spec.trace is not None
    subjects = sorted({r.subject for shard in plan.shards for r in shard.items})
    deviation = scheduler.call("embedding_deviation", subjects, version=scheduler.version)
    noise = float(deviation * plan.spec.trace.noise_scale)
    store.update_manifest(noise={"embedding_deviation": deviation, "noise": noise})

    def arguments(_: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
        return items, noise

    return arguments
