"""The job of assessing facts: in shards to the workers, a part of assessment/ a shard."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import pyarrow as pa
from rich.console import Console

from pipeline.cluster.observing import Observation, observe, without_editing
from pipeline.cluster.plan import Plan
from pipeline.cluster.run import RunResult
from pipeline.cluster.scheduler import Arguments, Scheduler
from pipeline.errors import InputError
from pipeline.evaluation.knowledge import draw_contrasts
from pipeline.requests import EditRequest
from pipeline.results.store import RunStore
from pipeline.spec import AssessSpec, JobSpec


def run_assess(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None = None,
    *,
    restart: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Find which facts of the requests the unedited model holds, and leave a run directory behind.

    A run that the directory holds already is gone on with, if it is of the same job.

    Args:
        spec: the job; without `assess` it is assessed by that group's defaults. Settings of editing
            have no say.
        requests: edit requests given in memory; null reads `spec.requests`.
        restart: begin anew in the first of PATH, PATH-2, PATH-3, ... that is free.
        console: where to show progress; null is silent.

    Raises:
        InputError: as of `run_trace`, or all requests are of one relation.
        JobFailedError: the job could not go on; the run directory holds what was finished.
        ResultsDamagedError: the run's manifest is damaged.
    """
    spec = without_editing(spec, "an assessment", assess=spec.assess or AssessSpec(), trace=None)
    what = Observation("assessment", "assessed", _contrasts, _arguments, _summarise)
    return observe(spec, requests, what, restart=restart, console=console)


def _contrasts(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Each request's contrastive prompts."""
    assert plan.spec.assess is not None
    requests = [request for shard in plan.shards for request in shard.items]
    contrasts = draw_contrasts(requests, plan.spec.assess.prompts, plan.spec.seed)
    if not all(contrasts.values()):
        raise InputError(
            "assess: all requests are of one relation, so that there is none to contrast it with;"
            " read requests of several relations"
        )
    return contrasts


def _arguments(plan: Plan, scheduler: Scheduler, store: RunStore) -> Arguments:
    contrasts = _contrasts(plan)

    def arguments(_: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
        return items, [contrasts[request.case_id] for request in items]

    return arguments


def _summarise(plan: Plan, table: pa.Table) -> dict[str, Any]:
    """How many facts are held, of all and of each relation."""
    assert plan.spec.assess is not None
    by_relation: dict[str, list[bool]] = defaultdict(list)
    rows = table.select(["relation_id", "is_held", "score"]).to_pylist()
    for row in rows:
        by_relation[row["relation_id"] or ""].append(row["is_held"])
    scores = [row["score"] for row in rows if row["score"] is not None]
    return {
        "facts": len(rows),
        "held": sum(row["is_held"] for row in rows),
        "threshold": plan.spec.assess.threshold,
        "median_score": median(scores) if scores else None,
        "relations": {
            name: {"facts": len(held), "held": sum(held)}
            for name, held in sorted(by_relation.items())
        },
    }
