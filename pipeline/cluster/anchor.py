"""The norm anchor of NAS: the mean length of v on the unedited model, measured once a job."""

import logging
import math
import random

from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.plan import Plan
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.shards import Shard
from pipeline.errors import JobFailedError
from pipeline.methods import mean_length
from pipeline.requests import quote

log = logging.getLogger(__name__)


def measure_anchor(plan: Plan, scheduler: Scheduler, progress: PhaseProgress) -> float:
    """Search values of some of the job's requests before the first edit; their mean length.

    The same bits however many workers there are. An edit whose search fails does not count.

    Args:
        plan: the job; `method.nas.anchor_edits` of its requests are drawn by the spec's seed.
        scheduler: its workers are at version 0 and have their contexts.
        progress: shows how far it is.

    Raises:
        JobFailedError: no value could be found.
    """
    shards = _drawn(plan)
    lengths: dict[int, list[float]] = {}
    reason = "their values are not finite"
    total = sum(len(shard.items) for shard in shards)
    with progress.phase("anchor", total) as ticker:
        outcomes = scheduler.run("value_lengths", shards, lambda _, items: (items,), version=0)
        for outcome in outcomes:
            found = [length for piece in outcome.done for length in piece.result]
            lengths[outcome.shard.index] = [x for x in found if math.isfinite(x)]
            for request, why in outcome.failures:
                reason = why
                log.warning("norm anchor: request %s: %s", quote(request.case_id), why)
            ticker.advance(len(outcome.shard.items))
    finite = [length for index in sorted(lengths) for length in lengths[index]]
    if not finite:
        raise JobFailedError(
            f"method.nas.anchor_norm cannot be measured: not one of {total} requests has a value"
            f" ({reason}); give it as a number"
        )
    anchor = mean_length(finite)
    progress.say(f"norm anchor: {anchor:.5g}, the mean over {len(finite)} values")
    return anchor


def _drawn(plan: Plan) -> list[Shard]:
    """Requests of all rounds, in their order, so that batches of like length stay together."""
    requests = [request for shard in plan.shards for request in shard.items]
    count = min(plan.spec.method.nas.anchor_edits, len(requests))
    generator = random.Random(f"{plan.spec.seed} anchor")
    places = sorted(generator.sample(range(len(requests)), count))
    return cut_shards([requests[place] for place in places], plan.spec.cluster.shard_size)
