"""Edited weights: W = W0 + sum of updates in float32, cast once; undoing gives W0's own bits."""

import torch
from torch import Tensor

from pipeline.models.editable import EditableModel


class EditedWeights:
    """Pristine copies of the weights that are edited, and what has been added to them.

    Args:
        model: the model, unedited.
        layers: blocks whose down-projection will be edited.
    """

    def __init__(self, model: EditableModel, layers: tuple[int, ...]) -> None:
        self.model = model
        self.version = 0
        self._pristine = {layer: model.oriented_weight(layer).clone() for layer in layers}
        self._total: dict[int, Tensor] = {}

    @torch.no_grad()
    def apply(self, layer: int, update: Tensor) -> None:
        """Add an update (D, F), float32, to a layer's weight, and count one version up.

        Raises:
            ValueError: the layer was not announced, or the shape is another.
        """
        if layer not in self._pristine:
            raise ValueError(f"layer {layer} is not among the edited ones {list(self._pristine)}")
        pristine = self._pristine[layer]
        if update.shape != pristine.shape:
            raise ValueError(
                f"layer {layer}: the update is {tuple(update.shape)}, the weight"
                f" {tuple(pristine.shape)}"
            )
        wide = torch.promote_types(pristine.dtype, torch.float32)
        update = update.to(device=pristine.device, dtype=wide)
        total = self._total.get(layer)
        self._total[layer] = update.clone() if total is None else total + update
        self.model.oriented_weight(layer).copy_(pristine.to(wide) + self._total[layer])
        self.version += 1

    @torch.no_grad()
    def revert(self) -> None:
        """Put the pristine bits back and go to version 0."""
        for layer, pristine in self._pristine.items():
            self.model.oriented_weight(layer).copy_(pristine)
        self._total.clear()
        self.version = 0
