"""Calls of methods that look for the neurons of facts."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.cluster.calls.base import TOKENS_PER_BACKWARD, Worker
from pipeline.cluster.neuron_tables import attribution_rows
from pipeline.editing.knowledge_neurons import NeuronEdit
from pipeline.editing.update import Update
from pipeline.methods import KnowledgeNeurons
from pipeline.prompts import encode_targets, tokenize_fact_prompts
from pipeline.requests import EditRequest


class NeuronCalls(Worker):
    """Attributions of facts to neurons, and updates of these."""

    def attribute(
        self, requests: Sequence[EditRequest], *, version: int, round: int
    ) -> tuple[pa.Table, dict[str, str]]:
        """Look for the neurons of facts: rows of attributions/, and case_id -> why there are none.

        What is asked for is a request's `target_true`, or what the model answers
        (`method.kn.old_answer`).
        """
        self._require(version)
        settings, asked = self._locating.spec.kn, list(requests)
        failed: dict[str, str] = {}
        if with_old := settings.old_answer == "target_true":
            reason = "it has no target_true; method.kn.old_answer: argmax takes the model's answer"
            failed = {r.case_id: reason for r in asked if r.target_true is None}
            asked = [request for request in asked if request.case_id not in failed]
        facts = tokenize_fact_prompts(
            self.tokenizer,
            asked,
            self.contexts,
            paraphrases=settings.paraphrases,
            with_old=with_old,
        )
        most = TOKENS_PER_BACKWARD[self.model.input_device.type]
        found = list(self._locating.find(self.model, facts, most))
        reason = "no neuron has a positive, finite attribution"
        failed |= {
            request.case_id: reason
            for request, candidates in zip(asked, found, strict=True)
            if not candidates.neurons
        }
        return attribution_rows(self.tokenizer, asked, found, round), failed

    def change_neurons(
        self,
        layer: int,
        requests: Sequence[EditRequest],
        neurons: Sequence[tuple[int, ...]],
        answers: Sequence[tuple[int, ...]],
        *,
        version: int,
    ) -> Update:
        """The update of a layer in which each request's neurons, and no others, change.

        Args:
            answers: token ids of the requests' old answers.
        """
        self._require(version)
        new = encode_targets(self.tokenizer, [request.target_new for request in requests])
        edits = [NeuronEdit(*one) for one in zip(neurons, answers, new, strict=True)]
        return self._locating.update(self.weights, layer, edits)

    @property
    def _locating(self) -> KnowledgeNeurons:
        assert isinstance(self.method, KnowledgeNeurons), "this method looks for no neurons"
        return self.method
