"""T-Patcher (arXiv 2301.09785): one neuron for every wrong target token, in one block.

Patches of earlier rounds stay as they are, and the queries that they were made at are remembered
with those of the unedited model on other texts. The edits of a round are trained by themselves on
the model of the round before, so that they can be trained side by side; a study of one edit a round
is the published sequence.
"""

from collections.abc import Sequence

from pipeline.editing.adapters import Adapter, NeuronBank
from pipeline.editing.patches import PatchSettings
from pipeline.editing.patching import PatchedEdit, QueryMemory, train_patches
from pipeline.methods.adapter import AdapterMethod, Made, Scene
from pipeline.prompts import EditPrompts
from pipeline.spec import MethodSpec


class TPatcher(AdapterMethod):
    """Patches in the (one) edited block."""

    table = "patches"

    def __init__(self, spec: MethodSpec) -> None:
        super().__init__(spec)
        self.layer = self.layers[0]
        own = {"memory_queries", "watched_queries", "update_memory"}
        self.settings = PatchSettings(**spec.t_patcher.model_dump(exclude=own))

    @property
    def num_queries(self) -> int:
        settings = self.spec.t_patcher
        return settings.memory_queries + settings.watched_queries

    def make(self, scene: Scene, edits: Sequence[EditPrompts], seeds: Sequence[int]) -> Made:
        found = train_patches(
            scene.model,
            self.layer,
            edits,
            self._memory(scene),
            self.settings,
            seeds,
            scene.max_tokens,
        )
        model = scene.model
        empty = NeuronBank.empty(model.hidden_size, model.activation, with_queries=True)
        bank: Adapter = NeuronBank.joined([empty, *(edit.bank for edit in found)])
        return Made({self.layer: bank}, [self._row(edit) for edit in found])

    def _memory(self, scene: Scene) -> QueryMemory:
        watched = min(self.spec.t_patcher.watched_queries, len(scene.memory_ND) // 2)
        split = len(scene.memory_ND) - watched
        trained, before = [scene.memory_ND[:split]], scene.before.get(self.layer)
        if before is not None and self.spec.t_patcher.update_memory:
            trained.append(before.parts["queries"])
        return QueryMemory(tuple(trained), (scene.memory_ND[split:],))

    def _row(self, edit: PatchedEdit) -> dict[str, object]:
        return {
            "layer": self.layer,
            "patches": edit.bank.num_neurons,
            "steps": edit.steps,
            "edit_loss": edit.edit_loss,
            "activation_loss": edit.activation_loss,
            "memory_loss": edit.memory_loss,
            "difference_loss": edit.difference_loss,
            "least_activation": edit.least_activation,
            "greatest_memory": edit.greatest_memory,
            "target_probability": edit.target_probability,
        }
