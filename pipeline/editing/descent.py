"""Adam on the weights of some layers, from gradients that arrive as factors.

What is optimised is the change of a weight, not the weight: in float32 a small change keeps all its
bits there. Sums over shards are float64, in the order in which they are added.

Shapes: F key size, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.gradients import Factors


@dataclass(frozen=True)
class DescentSettings:
    """How to descend; names and meaning as in the job spec's `method.ft`."""

    learning_rate: float
    weight_decay: float
    stop_loss: float
    norm_constraint: float | None


@dataclass(frozen=True)
class Step:
    """One step of the descent.

    Attributes:
        edits: how many edits its gradient is the mean of.
        loss: their mean loss before it, nats a target token.
        changes: layer -> (D, F) float32 change so far, or whatever the method's workers go on from;
            None where the loss was low enough to leave things as they were.
    """

    edits: int
    loss: float
    changes: dict[int, Any] | None


class Descent:
    """The optimiser of one round.

    Args:
        weights: layer -> (D, F) weight at the beginning, float64.
        pristine: the unedited model's, around which the box of `norm_constraint` lies.
        settings: how to descend.
    """

    def __init__(
        self,
        weights: Mapping[int, Tensor],
        pristine: Mapping[int, Tensor],
        settings: DescentSettings,
    ) -> None:
        self.settings = settings
        self._weights = {layer: weight.float() for layer, weight in weights.items()}
        self._moved = {layer: (weights[layer] - pristine[layer]).float() for layer in weights}
        self.changes = {layer: torch.zeros_like(weight) for layer, weight in self._weights.items()}
        self._adam = torch.optim.Adam(list(self.changes.values()), lr=settings.learning_rate)
        self._sums: dict[int, Tensor] = {}
        self._losses: list[Tensor] = []

    def add(self, factors: Factors) -> None:
        """Take the factors of some edits of the next step."""
        self._losses.append(factors.losses)
        for layer, change in self.changes.items():
            found = factors.matrix(layer).to(change.device)
            self._sums[layer] = found if layer not in self._sums else self._sums[layer] + found

    @torch.no_grad()
    def step(self) -> Step:
        """Go one step down the mean gradient of the edits that were added since the last one."""
        losses = torch.cat(self._losses)
        loss, settings = float(losses.mean()), self.settings
        is_low = loss < settings.stop_loss
        if not is_low:
            for layer, change in self.changes.items():
                gradient = (self._sums[layer] / len(losses)).float()
                if settings.weight_decay:
                    gradient += settings.weight_decay * (self._weights[layer] + change)
                change.grad = gradient
            self._adam.step()
            self._back_into_the_box()
        self._sums.clear()
        self._losses.clear()
        changes = None if is_low else {k: change.clone() for k, change in self.changes.items()}
        return Step(len(losses), loss, changes)

    def _back_into_the_box(self) -> None:
        bound = self.settings.norm_constraint
        if bound is None:
            return
        for layer, change in self.changes.items():
            moved = self._moved[layer]
            torch.clamp(change, -bound - moved, bound - moved, out=change)


def mean_loss(steps: Sequence[Step]) -> float:
    """The mean loss of an epoch's edits, each as it was at its step."""
    return sum(step.loss * step.edits for step in steps) / sum(step.edits for step in steps)
