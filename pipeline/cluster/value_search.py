"""The value search of a round: a stage after another, a part a shard."""

from collections.abc import Container
from dataclasses import replace
from itertools import chain
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.outcomes import finite_values, num_items, shards_left
from pipeline.cluster.plan import Plan
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Outcome, Scheduler
from pipeline.cluster.shards import Shard
from pipeline.results.store import RunStore

# Edits of small rounds that are searched together.
_EDITS_TOGETHER = 16


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


def search_values_apart(
    plan: Plan, scheduler: Scheduler, store: RunStore, progress: PhaseProgress
) -> None:
    """Search the first values of all rounds of a study that rolls back, in one phase.

    All of them are of the unedited model, so edits of several rounds share a shard.

    Args:
        plan: the study.
        scheduler: its workers hold no update.
        store: the run; each value is in the part that a search of its round would have written.
        progress: shows how far it is.
    """
    every = [
        (round, shard)
        for round in range(len(plan.rounds.shards))
        for shard in plan.value_shards(round, 0)
    ]
    groups = _of_like_length(every, plan.spec.cluster.shard_size)
    left = {
        group.index: [
            (round, shard)
            for round, shard in group.items
            if not store.has_part("values", round, shard.index)
        ]
        for group in groups
    }
    # A group is searched as a whole whatever is left of it: its batches decide last bits.
    searched = [
        Shard(group.index, tuple(request for _, shard in group.items for request in shard.items))
        for group in groups
        if left[group.index]
    ]
    total = num_items([shard for _, shard in every])
    with progress.phase("values", total, total - num_items(searched)) as ticker:
        outcomes = scheduler.run("values", searched, lambda _, items: (items,), version=0, round=0)
        for outcome in outcomes:
            rows, failed = finite_values(outcome)
            for round, shard in left[outcome.shard.index]:
                case_ids = [request.case_id for request in shard.items]
                own = rows.filter(pc.is_in(rows["case_id"], pa.array(case_ids)))
                numbers = pa.array([round] * own.num_rows, pa.int32())
                store.write_part(
                    "values",
                    own.set_column(own.column_names.index("round"), "round", numbers),
                    round=round,
                    shard=shard.index,
                    weight_version=0,
                    failed={name: failed[name] for name in case_ids if name in failed},
                )
            ticker.advance(len(outcome.shard.items))


def _of_like_length(every: list[tuple[int, Shard]], size: int | Literal["auto"]) -> list[Shard]:
    """Shards of rounds, put together to groups of about `size` edits, the longest first."""

    def length(entry: tuple[int, Shard]) -> int:
        return max(len(request.text) + len(request.target_new) for request in entry[1].items)

    largest = max((len(shard.items) for _, shard in every), default=1)
    together: int | Literal["auto"] = size
    if largest > 1:
        together = max(1, (_EDITS_TOGETHER if size == "auto" else size) // largest)
    return cut_shards(sorted(every, key=length, reverse=True), together)


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
