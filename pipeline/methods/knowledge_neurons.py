"""KN (arXiv 2104.08696): the neurons that hold a fact are looked for, and their values changed.

Workers attribute every fact; which neurons are edited follows from those of all facts of a round,
since a neuron that many facts of a relation have belongs to the relation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.editing.attribution import AttributionSettings, attribute
from pipeline.editing.knowledge_neurons import (
    Candidate,
    Candidates,
    NeuronEdit,
    NeuronSettings,
    find_candidates,
    neuron_update,
    refine,
    sharing_facts,
)
from pipeline.editing.update import EditedWeights, Update
from pipeline.methods.base import Method
from pipeline.models.editable import EditableModel
from pipeline.prompts import FactPrompts


@dataclass(frozen=True)
class Chosen:
    """A neuron that a fact's prompts agree on.

    Attributes:
        candidate: the neuron, with its attribution.
        shared_by: share of the relation's other facts that have it, too.
        is_edited: whether it is edited for this fact.
    """

    candidate: Candidate
    shared_by: float
    is_edited: bool


class KnowledgeNeurons(Method):
    """Settings: `method.kn`."""

    def find(
        self, model: EditableModel, facts: Sequence[FactPrompts], max_tokens: int
    ) -> Iterator[Candidates]:
        """Attribute facts to the neurons of all edited layers, and keep those that stand out."""
        asked = self.spec.kn
        settings = AttributionSettings(asked.steps, asked.quadrature, asked.measure)
        for found in attribute(model, facts, self.layers, settings, max_tokens=max_tokens):
            yield find_candidates(found, self.layers, asked.threshold)

    def choose(
        self, found: Sequence[Candidates], relations: Sequence[str | None]
    ) -> list[list[Chosen]]:
        """Choose neurons of every fact of a round: those that its prompts agree on.

        Args:
            found: the facts' candidates.
            relations: the relation that each fact is of.
        """
        asked = self.spec.kn
        agreed = [
            refine(one, asked.prompt_share, asked.fewest_neurons, asked.most_neurons)
            for one in found
        ]
        names = [[candidate.neuron for candidate in chosen] for chosen in agreed]
        shares = sharing_facts(names, relations)
        return [
            [Chosen(c, share[c.neuron], share[c.neuron] <= asked.shared_by) for c in chosen]
            for chosen, share in zip(agreed, shares, strict=True)
        ]

    def update(self, weights: EditedWeights, layer: int, edits: Sequence[NeuronEdit]) -> Update:
        """The update of one layer, on its weight as it is now."""
        asked = self.spec.kn
        settings = NeuronSettings(
            asked.operation, asked.scaling, asked.old_weight, asked.new_weight
        )
        embeddings = weights.model.output_embeddings
        return neuron_update(weights.masters(layer)[0], embeddings, edits, settings)
