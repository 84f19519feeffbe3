"""Edited weights: W = W0 + sum of updates in float32, cast once; undoing gives W0's own bits."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.models.editable import EditableModel

_SIGN_VECTORS = 64


@dataclass(frozen=True)
class Update:
    """One layer's update, (D, F), dense or as two factors, whichever is smaller.

    Attributes:
        parts: {"dense": (D, F)} or {"left": (D, N), "right": (N, F)}, float32 on the CPU.
        ridge: what had to be added to the normal equations' diagonal, 0 as a rule.
        rank: directions out of F that it was allowed to use; None where all were.
    """

    parts: Mapping[str, Tensor]
    ridge: float = 0.0
    rank: int | None = None

    @classmethod
    def of(
        cls,
        left: Tensor,
        right: Tensor | None = None,
        ridge: float = 0.0,
        rank: int | None = None,
    ) -> "Update":
        """Keep a dense matrix, or the product of two factors in its smaller form."""
        if right is None:
            return cls({"dense": left.float().cpu()}, ridge, rank)
        if left.numel() + right.numel() < left.shape[0] * right.shape[1]:
            return cls({"left": left.float().cpu(), "right": right.float().cpu()}, ridge, rank)
        return cls({"dense": (left @ right).float().cpu()}, ridge, rank)

    def matrix(self, device: torch.device | None = None) -> Tensor:
        """The update as one (D, F) float32 matrix; factors are multiplied in float64."""
        if "dense" in self.parts:
            return self.parts["dense"].to(device)
        left, right = self.parts["left"].to(device), self.parts["right"].to(device)
        return (left.double() @ right.double()).float()

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.matrix().norm())


def output_change(update: Update, covariance_FF: Tensor) -> float:
    """Length by which an update moves a layer's output at an ordinary token (root mean square).

    That is sqrt(tr(dW C dW^T)), estimated to some per cent from 64 sign vectors with a constant
    seed (Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990), since
    the product itself costs as much as a solve. The norm of dW says little: most of it lies where
    no key is, and it may be hundreds of times the weight's in a sound batch.

    Args:
        update: the update, dW.
        covariance_FF: C, float64.
    """
    generator = torch.Generator().manual_seed(0)
    sides = [part.double() for part in update.parts.values()]
    signs = torch.randint(0, 2, (_SIGN_VECTORS, len(sides[0])), generator=generator)
    moved = signs.double().mul_(2).sub_(1)
    for side in sides:
        moved = moved @ side
    return float(((moved @ covariance_FF) * moved).sum().div(_SIGN_VECTORS).clamp(min=0).sqrt())


class EditedWeights:
    """Pristine copies of the weights that are edited, and what has been added to them.

    Args:
        model: the model, unedited.
        layers: blocks whose down-projection will be edited.
    """

    def __init__(self, model: EditableModel, layers: tuple[int, ...]) -> None:
        self.model = model
        self.layers = layers
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
        self._write(layer)
        self.version += 1

    def masters(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's weight as it is now and as it was at first, (D, F) float64, before any cast."""
        pristine = self._pristine[layer].double()
        total = self._total.get(layer)
        return pristine if total is None else pristine + total.double(), pristine

    @torch.no_grad()
    def revert(self) -> None:
        """Put the pristine bits back and go to version 0."""
        for layer, pristine in self._pristine.items():
            self.model.oriented_weight(layer).copy_(pristine)
        self._total.clear()
        self.version = 0

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Let the model have its pristine weights for a while; the edited bits come back after."""
        try:
            self.lay_down()
            yield
        finally:
            self.take_up()

    @torch.no_grad()
    def lay_down(self) -> None:
        """Leave the model with its pristine weights, for somebody else's updates."""
        for layer in self._total:
            self.model.oriented_weight(layer).copy_(self._pristine[layer])

    @torch.no_grad()
    def take_up(self) -> None:
        """Write the edited weights again, to the same bits, into a model that has pristine ones."""
        for layer in self._total:
            self._write(layer)

    @contextmanager
    @torch.no_grad()
    def tried(self, changes: Mapping[int, Tensor]) -> Iterator[None]:
        """Let the model have more changes for a while, layer -> (D, F), without a version."""
        try:
            for layer, change in changes.items():
                self._write(layer, change)
            yield
        finally:
            for layer in changes:
                self._write(layer)

    def norms(self, layer: int) -> tuple[float, float]:
        """Frobenius norms of a layer's weight as it is now, and of all that was added to it."""
        total = self._total.get(layer)
        weight = self.model.oriented_weight(layer)
        return float(weight.double().norm()), 0.0 if total is None else float(total.double().norm())

    def _write(self, layer: int, more: Tensor | None = None) -> None:
        pristine, total = self._pristine[layer], self._total.get(layer)
        wide = torch.promote_types(pristine.dtype, torch.float32)
        if more is not None:
            more = more.to(device=pristine.device, dtype=wide)
            total = more if total is None else total + more
        edited = pristine if total is None else pristine.to(wide) + total
        self.model.oriented_weight(layer).copy_(edited)
