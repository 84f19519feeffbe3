"""Edited weights: W = W0 + sum of updates in float32, cast once; undoing gives W0's own bits.

A block's change is an `Update` of its weight or an `Adapter` beside it; both are applied, counted,
laid down and reverted by `EditedWeights`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor

from pipeline.editing.adapters import Adapter
from pipeline.errors import InputError
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

    @property
    def is_empty(self) -> bool:
        """Whether it is a product of no factors at all, which changes nothing."""
        return "left" in self.parts and self.parts["left"].shape[1] == 0

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


Change = Update | Adapter
"""What a round does to a block."""
_Place = tuple[int, str]
"""A block, and the kind of an adapter."""


class EditedWeights:
    """Pristine copies of the weights that are edited, what has been added to them, and adapters.

    Args:
        model: the model, unedited.
        layers: blocks that will be edited.
    """

    def __init__(self, model: EditableModel, layers: tuple[int, ...]) -> None:
        self.model = model
        self.layers = layers
        self.version = 0
        self._pristine: dict[int, Tensor] = {}
        self._total: dict[int, Tensor] = {}
        self._adapters: dict[_Place, Adapter] = {}
        self._detach: dict[_Place, Callable[[], None]] = {}

    @property
    def adapters(self) -> list[tuple[int, Adapter]]:
        """Layer and adapter of all that are beside the model, each with all of its increments."""
        return [
            (layer, adapter)
            for (layer, _), adapter in sorted(self._adapters.items(), key=itemgetter(0))
        ]

    @torch.no_grad()
    def apply(self, layer: int, change: Change | Tensor) -> None:
        """Apply a block's change, and count one version up.

        Args:
            layer: the block.
            change: an adapter's increment, or an update of the weight; a matrix (D, F), float32 or
                wider, is one too.

        Raises:
            ValueError: the layer was not announced, or the change does not fit the model.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not among the edited ones {list(self.layers)}")
        if isinstance(change, Adapter):
            self._adapters[layer, change.kind] = self._with(layer, change)
            self._attach(layer, change.kind)
        elif not (isinstance(change, Update) and change.is_empty):
            matrix = (
                change.matrix(self.model.device_of(layer)) if isinstance(change, Update) else change
            )
            self._add(layer, matrix)
        self.version += 1

    def masters(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's weight as it is now and as it was at first, (D, F) float64, before any cast."""
        pristine = self._original(layer).to(torch.float64, copy=True)
        total = self._total.get(layer)
        return pristine if total is None else pristine + total.double(), pristine

    def revert(self) -> None:
        """Put the pristine bits back and go to version 0."""
        self.lay_down()
        self._total.clear()
        self._adapters.clear()
        self.version = 0

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Let the model be unedited for a while; the edited bits come back after."""
        try:
            self.lay_down()
            yield
        finally:
            self.take_up()

    @torch.no_grad()
    def lay_down(self) -> None:
        """Leave the model unedited, for somebody else's changes."""
        for layer in self._total:
            self.model.oriented_weight(layer).copy_(self._pristine[layer])
        for place in list(self._detach):
            self._detach.pop(place)()

    @torch.no_grad()
    def take_up(self) -> None:
        """Edit a model that is unedited again, to the same bits."""
        for layer in self._total:
            self._write(layer)
        for place in self._adapters:
            self._attach(*place)

    @contextmanager
    @torch.no_grad()
    def tried(self, changes: Mapping[int, Adapter | Tensor]) -> Iterator[None]:
        """Let the model have more changes for a while, layer -> change, without a version."""
        adapters = {k: change for k, change in changes.items() if isinstance(change, Adapter)}
        matrices = {k: change for k, change in changes.items() if isinstance(change, Tensor)}
        try:
            for layer, matrix in matrices.items():
                self._write(layer, matrix)
            for layer, adapter in adapters.items():
                self._attach(layer, adapter.kind, self._with(layer, adapter))
            yield
        finally:
            for layer in matrices:
                self._write(layer)
            for layer, adapter in adapters.items():
                self._attach(layer, adapter.kind)

    @torch.no_grad()
    def apart(self, layer: int, changes: Sequence[Tensor]) -> Tensor:
        """What a layer's weight would be with each of N changes (D, F) alone: (N, D, F), as the
        model has it."""
        weight = self.model.oriented_weight(layer)
        found = weight.new_empty(len(changes), *weight.shape)
        for place, change in zip(found, changes, strict=True):
            place.copy_(self._edited(layer, change))
        return found

    def merge(self) -> None:
        """Write the adapters into the model's own weights, for good.

        Raises:
            InputError: there is none, or the architecture does not allow it.
        """
        if not self._adapters:
            raise InputError("there is no adapter to merge: the edits are in the weights already")
        for layer, adapter in self.adapters:
            adapter.merge(self.model, layer)
            self._detach.pop((layer, adapter.kind))()
        self._adapters.clear()

    def norms(self, layer: int) -> tuple[float, float]:
        """Norms of a layer's weight as it is now, and of all that was added to it or beside it."""
        total = self._total.get(layer)
        weight = self.model.oriented_weight(layer)
        added = [] if total is None else [float(total.double().norm())]
        added += [adapter.norm() for place, adapter in self._adapters.items() if place[0] == layer]
        return float(weight.double().norm()), math.hypot(*added)

    def _with(self, layer: int, increment: Adapter) -> Adapter:
        """All of a block's increments of a kind, with one more."""
        if misfit := increment.misfit(self.model, layer):
            raise ValueError(f"layer {layer}: {misfit}")
        before = self._adapters.get((layer, increment.kind))
        return increment if before is None else type(increment).joined([before, increment])

    def _attach(self, layer: int, kind: str, adapter: Adapter | None = None) -> None:
        """Put an adapter, null the block's own, in the place of what is there."""
        if detach := self._detach.pop((layer, kind), None):
            detach()
        adapter = adapter or self._adapters.get((layer, kind))
        if adapter is not None:
            self._detach[layer, kind] = adapter.attach(self.model, layer)

    def _add(self, layer: int, update: Tensor) -> None:
        pristine = self._original(layer)
        if update.shape != pristine.shape:
            raise ValueError(
                f"layer {layer}: the update is {tuple(update.shape)}, the weight"
                f" {tuple(pristine.shape)}"
            )
        wide = torch.promote_types(pristine.dtype, torch.float32)
        update = update.to(device=pristine.device, dtype=wide)
        total = self._total.get(layer)
        added = update.clone() if total is None else total + update
        self._keep(layer)
        self._total[layer] = added
        self._write(layer)

    def _original(self, layer: int) -> Tensor:
        """A layer's weight as it was at first, which nothing has been written over yet."""
        return self._pristine.get(layer, self.model.oriented_weight(layer))

    def _keep(self, layer: int) -> None:
        """Copy a layer's pristine weight before it is written for the first time."""
        if layer not in self._pristine:
            self._pristine[layer] = self.model.oriented_weight(layer).clone()

    def _write(self, layer: int, more: Tensor | None = None) -> None:
        self._keep(layer)
        self.model.oriented_weight(layer).copy_(self._edited(layer, more))

    def _edited(self, layer: int, more: Tensor | None) -> Tensor:
        """A layer's weight with all that was added, and more."""
        pristine, total = self._original(layer), self._total.get(layer)
        wide = torch.promote_types(pristine.dtype, torch.float32)
        if more is not None:
            more = more.to(device=pristine.device, dtype=wide)
            total = more if total is None else total + more
        return pristine if total is None else pristine.to(wide) + total
