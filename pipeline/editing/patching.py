"""Training the patches of many edits side by side (T-Patcher, arXiv 2301.09785).

An edit's patches are tied to the target tokens that the model gets wrong, and are trained by
themselves: each edit has an optimiser, a learning rate and an end of its own, so that what comes of
it does not depend on which edits are trained beside it but for rounding. What stands before the
patched network never changes, and runs once.

Shapes: P patches, D hidden size, N remembered queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.activations import ACT2FN

from pipeline.editing.adapter_rows import AdapterRows, Added, Beside, TargetLosses, WrongTokens
from pipeline.editing.adapters import NeuronBank
from pipeline.editing.adapters.neurons import bank_output
from pipeline.editing.patches import (
    MemoryLosses,
    PatchSettings,
    activation_loss,
    memory_losses,
)
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

_PLATEAU_FACTOR, _PLATEAU_THRESHOLD, _LEAST_GAIN = 0.5, 0.05, 1e-3


@dataclass(frozen=True)
class QueryMemory:
    """Remembered queries, (N, D): those that are trained on, and those that are watched.

    Both come in pieces, which no edit copies.
    """

    trained: tuple[Tensor, ...]
    watched: tuple[Tensor, ...]

    def on(self, device: torch.device, dtype: torch.dtype) -> "QueryMemory":
        """The same where patches are trained."""
        both = [
            tuple(piece.to(device, dtype) for piece in pieces)
            for pieces in (self.trained, self.watched)
        ]
        return QueryMemory(*both)


@dataclass(frozen=True)
class PatchedEdit:
    """What came of one edit.

    Attributes:
        bank: its patches, with the queries that they were made at; none where nothing was wrong.
        steps: steps taken.
        edit_loss: l_e after them, nats a target token.
        activation_loss: l_a, 0 without patches.
        memory_loss: mean of l_m1 over patches, on the watched queries.
        difference_loss: of l_m2.
        least_activation: the least inner value of a patch at its own token; None without patches.
        greatest_memory: the greatest one at a watched query.
        target_probability: exp(-l) of the mean negative log-likelihood l of the target's tokens.
    """

    bank: NeuronBank
    steps: int
    edit_loss: float
    activation_loss: float
    memory_loss: float
    difference_loss: float
    least_activation: float | None
    greatest_memory: float | None
    target_probability: float


@dataclass(eq=False)
class _Patches:
    """One edit's patches in training: v = scale * direction, entry by entry, both trained."""

    edit: int
    queries: Tensor
    settings: PatchSettings
    keys: Tensor
    biases: Tensor
    scale: Tensor
    direction: Tensor
    adam: torch.optim.Adam = field(init=False)
    plateau: ReduceLROnPlateau = field(init=False)
    best: float = float("inf")
    steps: int = 0

    @classmethod
    def begin(cls, edit: int, queries_PD: Tensor, settings: PatchSettings, seed: int) -> "_Patches":
        """k = q / ||q||^2 and b = 0, so that the inner value at q is 1; v is drawn."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(queries_PD.shape, generator=generator, dtype=torch.float64)
        keys = queries_PD / queries_PD.square().sum(1, keepdim=True)
        made = cls(
            edit,
            queries_PD,
            settings,
            keys.clone(),
            torch.zeros_like(queries_PD[:, 0]),
            torch.full_like(queries_PD, settings.value_scale),
            drawn.to(queries_PD),
        )
        for part in made._trained:
            part.requires_grad_(True)
        return made

    def __post_init__(self) -> None:
        settings = self.settings
        self.adam = torch.optim.Adam(
            self._trained, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.plateau = ReduceLROnPlateau(
            self.adam, factor=_PLATEAU_FACTOR, patience=1, threshold=_PLATEAU_THRESHOLD
        )

    @property
    def _trained(self) -> list[Tensor]:
        return [self.keys, self.biases, self.scale, self.direction]

    @property
    def values(self) -> Tensor:
        return self.scale * self.direction

    def own(self) -> Tensor:
        """Inner values at the patches' own tokens, (P,)."""
        return (self.queries * self.keys).sum(1) + self.biases

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._trained, self.settings.clip_norm)
        self.adam.step()
        self.adam.zero_grad()
        self.steps += 1


def train_patches(
    model: EditableModel,
    layer: int,
    edits: Sequence[EditPrompts],
    memory: QueryMemory,
    settings: PatchSettings,
    seeds: Sequence[int],
    max_tokens: int,
) -> list[PatchedEdit]:
    """Train the patches of some edits, each by itself, on the model as it is.

    Args:
        model: the model, with the patches of earlier rounds.
        layer: the block that is patched.
        edits: tokenised requests; tokens are wrong behind the first context, and the loss is the
            mean over all contexts.
        memory: remembered queries of this block.
        settings: how to train.
        seeds: of each edit's values.
        max_tokens: tokens in one pass.

    Raises:
        ValueError: an edit's loss is not finite.
    """
    rows = AdapterRows.of(model, layer, edits, max_tokens)
    wrong = rows.wrong_tokens(settings.max_patches)
    wide = torch.promote_types(model.dtype, torch.float32)
    near = memory.on(model.device_of(layer), wide)
    patches = [
        _Patches.begin(edit, found.queries, settings, seeds[edit])
        for edit, found in enumerate(wrong)
        if len(found.queries)
    ]
    done = {edit: _unpatched(model, found) for edit, found in enumerate(wrong)}
    active = patches
    while active:
        # All of them have taken as many steps.
        for _ in range(min(settings.check_every, settings.steps - active[0].steps)):
            _step(rows, active, near.trained, settings)
        left = []
        for one, ended in zip(active, _checked(rows, active, near.watched, settings), strict=True):
            if ended is None:
                left.append(one)
            else:
                done[one.edit] = ended
        if len(left) < len(active):
            active = left
            rows.keep_only({one.edit for one in active})
    return [done[edit] for edit in range(len(edits))]


def _step(
    rows: AdapterRows, active: Sequence[_Patches], memory: Sequence[Tensor], settings: PatchSettings
) -> None:
    """One step of every edit; a sum of losses has each edit's own gradient in its own tensors."""
    with torch.enable_grad():
        target = rows.losses(_beside(rows, active), settings.label_smoothing)
        of_memory = _memory(active, memory, settings)
        total = target.smoothed[[one.edit for one in active]].sum()
        for one, found in zip(active, of_memory, strict=True):
            total = total + _beside_target(one, found, settings).to(total.device)
        total.backward()
    for one in active:
        one.step()


@torch.no_grad()
def _checked(
    rows: AdapterRows,
    active: Sequence[_Patches],
    watched: Sequence[Tensor],
    settings: PatchSettings,
) -> list[PatchedEdit | None]:
    """Lower learning rates that are stuck, and say what came of the edits that have ended."""
    target = rows.losses(_beside(rows, active), settings.label_smoothing)
    ended: list[PatchedEdit | None] = []
    for one, found in zip(active, _memory(active, watched, settings), strict=True):
        loss = float(target.smoothed[one.edit]) + float(_beside_target(one, found, settings))
        if not math.isfinite(loss):
            raise ValueError("the loss of its patches is not finite; take a smaller learning rate")
        one.plateau.step(loss)
        of_memory = float((found.memory + found.difference).mean())
        gained = of_memory < one.best - _LEAST_GAIN
        one.best = min(one.best, of_memory)
        is_over = one.steps >= settings.least_steps and bool(target.predicted[one.edit])
        if (is_over and not gained) or one.steps >= settings.steps:
            ended.append(_finished(rows.model, one, found, target))
        else:
            ended.append(None)
    return ended


def _memory(
    active: Sequence[_Patches], memory: Sequence[Tensor], settings: PatchSettings
) -> list[MemoryLosses]:
    """What each edit's patches pay for queries: one product with the queries for all of them."""
    found = memory_losses(
        torch.cat([one.keys for one in active]),
        torch.cat([one.biases for one in active]),
        torch.cat([one.own() for one in active]),
        memory,
        settings,
    )
    counts = [len(one.biases) for one in active]
    split = zip(
        found.memory.split(counts),
        found.difference.split(counts),
        found.greatest.split(counts),
        strict=True,
    )
    return [MemoryLosses(*parts) for parts in split]


def _beside_target(one: _Patches, found: MemoryLosses, settings: PatchSettings) -> Tensor:
    return (
        settings.activation_weight * activation_loss(one.own(), settings)
        + settings.memory_weight * found.memory.mean()
        + settings.difference_weight * found.difference.mean()
    )


def _beside(rows: AdapterRows, active: Sequence[_Patches]) -> Beside:
    """All patches as one bank, each of which acts on its own edit's tokens only."""
    activation = ACT2FN[rows.model.activation]
    bank = {
        "keys": torch.cat([one.keys for one in active]),
        "biases": torch.cat([one.biases for one in active]),
        "values": torch.cat([one.values for one in active]),
    }
    of_patch = torch.cat([torch.full((len(one.biases),), one.edit) for one in active])

    def beside(of_token: Tensor) -> dict[int, Added]:
        acts = of_token[:, None] == of_patch.to(of_token.device)
        return {rows.layer: lambda queries: bank_output(queries, bank, activation, acts)}

    return beside


def _unpatched(model: EditableModel, found: WrongTokens) -> PatchedEdit:
    """An edit that the model says already: no patch, no step."""
    bank = NeuronBank.empty(model.hidden_size, model.activation, with_queries=True)
    probability = math.exp(-found.loss)
    return PatchedEdit(bank, 0, found.loss, 0.0, 0.0, 0.0, None, None, probability)


def _finished(
    model: EditableModel, one: _Patches, found: MemoryLosses, target: TargetLosses
) -> PatchedEdit:
    own = one.own()
    bank = NeuronBank.of(one.keys, one.biases, one.values, model.activation, queries_MD=one.queries)
    return PatchedEdit(
        bank,
        one.steps,
        float(target.smoothed[one.edit]),
        float(activation_loss(own, one.settings)),
        float(found.memory.mean()),
        float(found.difference.mean()),
        float(own.min()),
        float(found.greatest.max()),
        float((-target.plain[one.edit]).exp()),
    )
