"""Methods in closed form: MEMIT's loop over layers, with the places where they differ."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.editing.equations import FewEdits, ManyEdits, NormalEquations, Penalty
from pipeline.editing.keys import KeyWave, Written
from pipeline.editing.values import FoundValue, find_merged_values
from pipeline.methods.base import Method
from pipeline.methods.merge import by_subject
from pipeline.methods.nas import anchor_values, value_lengths
from pipeline.methods.settings import value_settings
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts
from pipeline.spec import MethodSpec


class ClosedForm(Method, ABC):
    """Values are searched, and written by the solution of normal equations, layer after layer."""

    written: Written = "block"
    """Where in the last edited block a value belongs."""

    def __init__(self, spec: MethodSpec) -> None:
        super().__init__(spec)
        self.stages = spec.stages
        self.value = value_settings(spec)

    def stage_of(self, layer: int) -> tuple[int, ...]:
        """The layers that a layer's values are for."""
        return next(stage for stage in self.stages if layer in stage)

    def stage_at(self, version: int) -> int:
        """Which of `stages` is next for a model that holds so many updates, one a layer a round."""
        return self.stages.index(self.stage_of(self.layers[version % len(self.layers)]))

    def find_values(
        self,
        model: EditableModel,
        edits: Sequence[EditPrompts],
        batch_size: int,
        *,
        stage: int = 0,
        cuda_graphs: bool = False,
    ) -> list[FoundValue]:
        """Search z at the output of a stage's last block (or of its down-projection: `written`).

        With the wrapper `merge` the edits of a subject get one; `nas` rescales what was found.
        """
        layer, wrappers = self.stages[stage][-1], self.spec.wrappers
        alone = [[place] for place in range(len(edits))]
        places = by_subject(edits) if "merge" in wrappers else alone
        groups = [[edits[place] for place in group] for group in places]
        found = find_merged_values(
            model, groups, layer, self.value, batch_size, cuda_graphs=cuda_graphs
        )
        if "nas" in wrappers:
            first = [group[0] for group in groups]
            found = anchor_values(model, first, found, layer, self.spec.nas, self.written)
        of_edit = {p: value for group, value in zip(places, found, strict=True) for p in group}
        return [of_edit[place] for place in range(len(edits))]

    def value_lengths(
        self, model: EditableModel, edits: Sequence[EditPrompts], batch_size: int
    ) -> list[float]:
        """Search values behind the bare prompts, each by itself; ||v|| of every one (NAS)."""
        layer = self.layers[-1]
        bare = [replace(edit, rewrites=edit.rewrites[:1]) for edit in edits]
        found = find_merged_values(model, [[edit] for edit in bare], layer, self.value, batch_size)
        return value_lengths(model, bare, found, layer, self.written)

    def keys_and_residuals(
        self, wave: KeyWave, layer: int, values_ND: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Measure keys (N, F) and this layer's share of what is missing of the values (N, D).

        Each layer takes an equal share of what the layers of its stage from it upwards still have
        to write (MEMIT, arXiv 2210.07229, equation 20); one that is its own stage takes all of it.
        """
        keys, hidden = wave.read(layer)
        stage = self.stage_of(layer)
        layers_left = len(stage) - stage.index(layer)
        return keys, missing(values_ND, hidden) / self._spread(layers_left)

    def _spread(self, layers_left: int) -> float:
        """What a layer divides the residual by, when it and the ones above it are left."""
        return layers_left

    @abstractmethod
    def penalty(self, covariance_FF: Tensor) -> Penalty:
        """What an update of a layer pays for, from the layer's covariance alone.

        Costly where there is a basis; the same in every round.

        Raises:
            ValueError: the settings leave an update no direction.
        """

    def equations(
        self, penalty: Penalty, num_edits: int, past_FF: Tensor | None = None
    ) -> NormalEquations:
        """Start one layer's problem for N edits.

        Args:
            penalty: the layer's.
            num_edits: N.
            past_FF: sum of K K^T over earlier rounds, for a method that remembers.
        """
        if past_FF is not None and self.remembers:
            penalty = penalty.with_past(past_FF)
        return FewEdits(penalty) if num_edits < len(penalty.matrix) else ManyEdits(penalty)

    def _norm_penalty(self, matrix_FF: Tensor) -> Tensor:
        """Add mu I, the weight of ||D||_F^2 (ENCORE, arXiv 2502.01636)."""
        if self.spec.norm_penalty == 0.0:
            return matrix_FF
        return matrix_FF + self.spec.norm_penalty * torch.eye(len(matrix_FF)).to(matrix_FF)


def missing(values_ND: Tensor, hidden_ND: Tensor) -> Tensor:
    """What the hidden states lack of the values, float32 or wider, where the states are."""
    wide = torch.promote_types(values_ND.dtype, torch.float32)
    return values_ND.to(hidden_ND.device, wide) - hidden_ND.to(wide)
