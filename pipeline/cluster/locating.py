"""A round of a method that looks for neurons: workers attribute facts, then values are changed.

Every shard's attributions are a part of the run. Once all are there it follows from them which
neurons are edited, one part a round, and from these an update a layer; a layer without a neuron has
an update of rank 0.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.neuron_tables import candidates_by_case, edited_neurons, neuron_rows
from pipeline.cluster.outcomes import num_items, rows_and_failures, shards_left
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.round_updates import apply_stored, finished_update, store_update
from pipeline.cluster.scheduler import Outcome, Scheduler
from pipeline.cluster.shards import Shard
from pipeline.cluster.value_search import without
from pipeline.editing.knowledge_neurons import Candidates
from pipeline.errors import JobFailedError
from pipeline.methods import KnowledgeNeurons
from pipeline.requests import EditRequest
from pipeline.results.store import RunStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Locating:
    """Makes the updates of one round after another, and applies them.

    Attributes:
        method: what finds and changes neurons.
        scheduler: reaches the workers.
        store: the run.
        worker: names the edited weights.
        progress: shows how far it is.
    """

    method: KnowledgeNeurons
    scheduler: Scheduler
    store: RunStore
    worker: WorkerDescription
    progress: PhaseProgress

    def edit(self, shards: list[Shard], round: int) -> dict[str, str]:
        """Edit a round's requests; what the run holds already is taken as it is.

        Args:
            shards: the round's, with their numbers; they may be empty.

        Returns:
            The requests that failed, case_id -> reason.

        Raises:
            JobFailedError: of several requests not one has a neuron of its own.
            DivergedError: an update is not finite; none reached a weight.
        """
        failures = self._attribute(shards, round)
        requests = [r for shard in without(shards, failures) for r in shard.items]
        candidates = candidates_by_case(self.store.read_parts("attributions", round))
        if not self.store.has_part("neurons", round, 0):
            self._choose(requests, candidates, round)
        failures |= self.store.failed("neurons", round, {0})
        self._require_any(shards, failures, round)
        answers = {case_id: found.answer for case_id, found in candidates.items()}
        with self.progress.phase("insertion", len(self.method.layers)) as ticker:
            for layer, neurons in self._neurons(round).items():
                edited = [request for request in requests if request.case_id in neurons]
                if layer not in self.store.layers("update", round):
                    self._write(layer, edited, neurons, answers, round)
                ticker.advance(1)
            apply_stored(self.scheduler, self.store, self.method.layers, round)
        return failures

    def _attribute(self, shards: list[Shard], round: int) -> dict[str, str]:
        left = shards_left(self.store, "attributions", round, shards)
        version, total = self.scheduler.version, num_items(shards)
        with self.progress.phase("attribution", total, total - num_items(left)) as ticker:
            outcomes = self.scheduler.run(
                "attribute",
                [shard for shard in left if shard.items],
                lambda _, items: (items,),
                version=version,
                round=round,
            )
            # A shard of which nobody is left has a part all the same.
            for outcome in chain((Outcome(shard) for shard in left if not shard.items), outcomes):
                rows, failed = rows_and_failures("attributions", outcome)
                self.store.write_part(
                    "attributions",
                    rows,
                    round=round,
                    shard=outcome.shard.index,
                    weight_version=version,
                    failed=failed,
                )
                ticker.advance(len(outcome.shard.items))
        return self.store.failed("attributions", round, {shard.index for shard in shards})

    def _choose(
        self, requests: Sequence[EditRequest], found: Mapping[str, Candidates], round: int
    ) -> None:
        """Choose the neurons of all facts of the round, and write them down."""
        case_ids = [request.case_id for request in requests]
        chosen = self.method.choose(
            [found[case_id] for case_id in case_ids], [r.relation_id for r in requests]
        )
        failed = {
            case_id: _nothing_left(len(own))
            for case_id, own in zip(case_ids, chosen, strict=True)
            if not any(one.is_edited for one in own)
        }
        self.store.write_part(
            "neurons",
            neuron_rows(case_ids, chosen, round),
            round=round,
            shard=0,
            weight_version=self.scheduler.version,
            failed=failed,
        )

    def _require_any(self, shards: list[Shard], failures: Mapping[str, str], round: int) -> None:
        requests = [request for shard in shards for request in shard.items]
        if any(request.case_id not in failures for request in requests):
            return
        if len(requests) > 1:
            reason = failures[requests[0].case_id]
            raise JobFailedError(
                f"round {round}: no request has a neuron to edit; the first reason: {reason}; see"
                f" {self.store.place}"
            )
        # Where rounds are single edits, one that fails is no reason to end the study.
        log.warning("round %d: its request has no neuron; its updates are empty", round)

    def _neurons(self, round: int) -> dict[int, dict[str, tuple[int, ...]]]:
        """Layer -> case_id -> neurons to edit, of every layer."""
        found = edited_neurons(self.store.read_parts("neurons", round))
        return {layer: found.get(layer, {}) for layer in self.method.layers}

    def _write(
        self,
        layer: int,
        requests: Sequence[EditRequest],
        neurons: Mapping[str, tuple[int, ...]],
        answers: Mapping[str, tuple[int, ...]],
        round: int,
    ) -> None:
        """Make a layer's update on the round's first weights, and store it."""
        update = self.scheduler.call(
            "change_neurons",
            layer,
            requests,
            [neurons[request.case_id] for request in requests],
            [answers[request.case_id] for request in requests],
            version=self.scheduler.version,
        )
        update = finished_update(self.scheduler, self.method.spec, layer, update)
        store_update(
            self.store, self.worker, self.method.spec, round=round, layer=layer, update=update
        )


def _nothing_left(count: int) -> str:
    if count == 0:
        return "its prompts agree on no neuron"
    return (
        f"all {count} neurons that its prompts agree on are its relation's"
        " (method.kn.shared_by: more of the relation's other facts have them)"
    )
