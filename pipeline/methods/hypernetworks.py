"""MEND, MALMEN and KE: methods whose updates come from a network that was trained first.

Published, they edit the up-projections of an MLP as well as the down-projections; here, as with all
methods, the down-projections of `layers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.editing.conditions import ConditionedGradients
from pipeline.editing.descent import Step
from pipeline.editing.gradients import Factors, TargetGradients
from pipeline.editing.hypernetworks.ke import KnowledgeEditorNetwork
from pipeline.editing.hypernetworks.malmen import MalmenNetwork
from pipeline.editing.hypernetworks.mend import MendNetwork
from pipeline.editing.hypernetworks.network import HyperNetwork
from pipeline.editing.hypernetworks.rows import Sizes
from pipeline.editing.update import Update
from pipeline.editors import read_tensors
from pipeline.methods.gradient import GradientMethod, Making, State
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts
from pipeline.spec import MethodSpec


class TrainedMethod(GradientMethod, ABC):
    """A round's edits become updates in one step of the trained network."""

    @abstractmethod
    def network(self, sizes: Sizes, width: int, seed: int = 0) -> HyperNetwork:
        """The network, untrained.

        Args:
            sizes: layer -> (D, F).
            width: of the model's token embeddings.
            seed: draws its parameters.
        """

    def begin(
        self, weights: Mapping[int, Tensor], pristine: Mapping[int, Tensor], state: State | None
    ) -> Making:
        own = self.spec.trained
        assert own is not None and own.editor is not None and own.editor_sha256 is not None
        tensors = read_tensors(own.editor, own.editor_sha256)
        hidden_size = len(next(iter(weights.values())))
        width = tensors["separators"].shape[1] if "separators" in tensors else hidden_size
        sizes = {layer: (weight.shape[0], weight.shape[1]) for layer, weight in weights.items()}
        network = self.network(sizes, width)
        network.load_state_dict(tensors)
        return self.making(network.eval())

    def making(self, network: HyperNetwork) -> Making:
        """A round of the trained network."""
        return _Editing(network)


class Mend(TrainedMethod):
    """All tokens' factors, each mapped by itself, added up over the edits."""

    def network(self, sizes: Sizes, width: int, seed: int = 0) -> MendNetwork:
        own = self.spec.mend
        return MendNetwork(
            sizes,
            rank=own.rank,
            hidden_layers=own.hidden_layers,
            edit_rate=own.edit_rate,
            seed=seed,
        )


class Malmen(TrainedMethod):
    """Factors at the tokens that predict a target, put together by a normal equation."""

    tokens = "target"

    def network(self, sizes: Sizes, width: int, seed: int = 0) -> MalmenNetwork:
        own = self.spec.malmen
        return MalmenNetwork(
            sizes, rank=own.rank, blocks=own.blocks, edit_rate=own.edit_rate, seed=seed
        )


class KnowledgeEditor(TrainedMethod):
    """One edit at a time, whose gradient is gated by what the edit says; again until it takes."""

    def __init__(self, spec: MethodSpec) -> None:
        super().__init__(spec)
        self.epochs = spec.ke.repeats

    def network(self, sizes: Sizes, width: int, seed: int = 0) -> KnowledgeEditorNetwork:
        own = self.spec.ke
        return KnowledgeEditorNetwork(
            sizes,
            width,
            condition_size=own.condition_size,
            hidden_size=own.hidden_size,
            lstm_size=own.lstm_size,
            max_scale=own.max_scale,
            begins=own.begins,
            seed=seed,
        )

    def gradients(
        self, model: EditableModel, edits: Sequence[EditPrompts], max_tokens: int, *, keeps: bool
    ) -> TargetGradients:
        return ConditionedGradients(model, edits, self.layers, self.read, max_tokens, keeps)

    def making(self, network: HyperNetwork) -> Making:
        return _Repeating(network, self.epochs)

    def is_done(self, epoch: Sequence[Step]) -> bool:
        return any(step.changes is None for step in epoch)


class _Editing(Making):
    def __init__(self, network: HyperNetwork) -> None:
        self._network = network
        self._parts: list[Factors] = []
        self._updates: dict[int, Update] = {}

    def add(self, factors: Factors) -> None:
        self._parts.append(factors)

    def step(self) -> Step:
        joined, self._parts = Factors.joined(self._parts), []
        changes = self._edit(joined)
        return Step(len(joined.losses), float(joined.losses.mean()), changes)

    def _edit(self, factors: Factors) -> dict[int, Tensor] | None:
        """Make the updates; what the next step goes on from, None where there is none."""
        self._updates = self._network.edit(factors)
        return None

    def finish(self) -> tuple[dict[int, Update], State]:
        return self._updates, {}


class _Repeating(_Editing):
    """An edit's updates, added up until the model gives the answer, or was changed often enough."""

    def __init__(self, network: HyperNetwork, repeats: int) -> None:
        super().__init__(network)
        self._left = repeats

    def _edit(self, factors: Factors) -> dict[int, Tensor] | None:
        before = self._updates
        if before and all(torch.equal(edit.old, edit.new) for edit in factors.conditions):
            return None
        super()._edit(factors)
        self._left -= 1
        if before:
            self._updates = {
                layer: Update.of(before[layer].matrix() + update.matrix())
                for layer, update in self._updates.items()
            }
        if not self._left:
            return None
        return {layer: update.matrix() for layer, update in self._updates.items()}


TRAINED: dict[str, type[TrainedMethod]] = {
    "mend": Mend,
    "malmen": Malmen,
    "ke": KnowledgeEditor,
}


def trained_method(spec: MethodSpec) -> TrainedMethod:
    """Make the method that a resolved spec names."""
    return TRAINED[spec.name](spec)
