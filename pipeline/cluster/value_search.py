"""The value search of a round: a stage after another, a part a shard."""

from collections.abc import Container
from dataclasses import replace
from itertools import chain

from pipeline.cluster.outcomes import finite_values, num_items, shards_left
from pipeline.cluster.plan import Plan
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Outcome, Scheduler
from pipeline.cluster.shards import Shard
from pipeline.results.store import RunStore


def search_values(
    plan: Plan,
    scheduler: Scheduler,
    store: RunStore,
    progress: PhaseProgress,
    *,
    round: int,
    stage: int,
    failures: Container[str],
) -> dict[str, str]:
    """Search the values of a round's stage that the run does not hold yet.

    Args:
        plan: the job.
        scheduler: its workers hold all updates before this stage.
        store: the run.
        progress: shows how far it is.
        round: the round.
        stage: which of the plan's stages; in a later one only those are searched for that have not
            failed so far.
        failures: case_ids that have.

    Returns:
        Those that failed in this stage, case_id -> reason.
    """
    shards = plan.value_shards(round, stage)
    if stage > 0:
        shards = without(shards, failures)
    left, version = shards_left(store, "values", round, shards), scheduler.version
    total = num_items(shards)
    with progress.phase("values", total, total - num_items(left)) as ticker:
        outcomes = scheduler.run(
            "values",
            [shard for shard in left if shard.items],
            lambda _, items: (items,),
            version=version,
            round=round,
        )
        # A shard of which nobody is left has a part all the same: all are there, or some are not.
        for outcome in chain((Outcome(shard) for shard in left if not shard.items), outcomes):
            rows, failed = finite_values(outcome)
            store.write_part(
                "values",
                rows,
                round=round,
                shard=outcome.shard.index,
                weight_version=version,
                failed={name: why + _what_stays(plan, stage) for name, why in failed.items()},
            )
            ticker.advance(len(outcome.shard.items))
    return store.failed("values", round, {shard.index for shard in shards})


def without(shards: list[Shard], failures: Container[str]) -> list[Shard]:
    """Shards less the requests that have failed; they keep their numbers, and may be empty."""
    return [
        replace(shard, items=tuple(r for r in shard.items if r.case_id not in failures))
        for shard in shards
    ]


def _what_stays(plan: Plan, stage: int) -> str:
    """What a reason says of a request that has been written into earlier layers."""
    if stage == 0:
        return ""
    searched = plan.stages[stage][-1]
    before = ", ".join(str(layer) for layers in plan.stages[:stage] for layer in layers)
    return f" (at layer {searched}; what was written for it into layer {before} stays)"
