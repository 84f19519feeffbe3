"""Gradients of the target's loss in the down-projections, as factors.

Of a linear layer y = W k the gradient in W is a sum over tokens of g k^T, g the gradient in y. The
factors are far smaller than the sum where edits are short, and some methods work on them (MEND,
arXiv 2110.11309, equation 3). Blocks below the lowest edited layer do not change while an update is
looked for, so what they put out is kept.

Shapes: N edits, R tokens whose factors are taken, F key size, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.editing.batching import token_batches
from pipeline.editing.targets import Read, TargetBatch, TargetRow, target_rows
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

Tokens = Literal["all", "target"]
"""Whose factors are taken: every token's, or only those that predict a target token."""


@dataclass(frozen=True)
class Factors:
    """What N edits say about the weights of some layers.

    Attributes:
        losses: (N,) float64 loss of every edit, nats a target token.
        keys: layer -> (R, F) float32 or wider, on the CPU.
        gradients: layer -> (R, D), the gradient of the sum of all losses in the layer's output.
    """

    losses: Tensor
    keys: dict[int, Tensor]
    gradients: dict[int, Tensor]

    def matrix(self, layer: int) -> Tensor:
        """The gradient of the summed losses in a layer's weight, (D, F) float64."""
        return self.gradients[layer].double().T @ self.keys[layer].double()


@dataclass
class _Pack:
    """A batch of rows, and what enters the lowest edited block."""

    targets: TargetBatch
    entered: Tensor | None = None


@dataclass
class TargetGradients:
    """The rows of N edits, whose gradients are taken again and again while the weights change.

    Args:
        model: the model; every call sees the edited weights that it has at that time.
        edits: tokenised requests, N of them.
        layers: blocks whose down-projections count, ascending.
        read: where the target is predicted.
        max_tokens: tokens in one batch.
        keeps: whether what enters the lowest edited block is kept between calls.
    """

    model: EditableModel
    edits: Sequence[EditPrompts]
    layers: tuple[int, ...]
    read: Read
    max_tokens: int
    keeps: bool = True
    _rows: list[TargetRow] = field(init=False)
    _packs: list[_Pack] = field(init=False)

    def __post_init__(self) -> None:
        self._rows = target_rows(self.edits, self.read)
        batches = token_batches(self.model, [row.ids for row in self._rows], self.max_tokens)
        device = self.model.output_device
        self._packs = [_Pack(TargetBatch.of(batch, self._rows, device)) for batch in batches]

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept between calls, once it is."""
        tokens = sum(pack.targets.batch.ids.numel() for pack in self._packs)
        return tokens * self.model.hidden_size * self.model.dtype.itemsize if self.keeps else 0

    def factors(self, tokens: Tokens) -> Factors:
        """Run all rows forwards and backwards."""
        losses = torch.zeros(len(self.edits), dtype=torch.float64)
        keys: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        gradients: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for pack in self._packs:
            of_rows, found = self._backward(pack, tokens)
            numbers = [self._rows[row].edit for row in pack.targets.batch.index.tolist()]
            losses.index_add_(0, torch.tensor(numbers), of_rows)
            for layer, (key, gradient) in found.items():
                keys[layer].append(key)
                gradients[layer].append(gradient)
        return Factors(
            losses,
            {layer: torch.cat(parts) for layer, parts in keys.items()},
            {layer: torch.cat(parts) for layer, parts in gradients.items()},
        )

    def _backward(
        self, pack: _Pack, tokens: Tokens
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Losses of a batch's rows, and each layer's factors."""
        targets, batch = pack.targets, pack.targets.batch
        entered = self._entered(pack)
        with torch.enable_grad(), watched(self.model, self.layers) as seen:
            states = self.model.final(
                entered,
                first=self.layers[0],
                masks=batch.masks,
                position_ids=batch.positions,
                input_ids=batch.ids if entered is None else None,
                read=targets.read,
            )
            losses = targets.losses(self.model, states)
            outputs = [seen[layer][1] for layer in self.layers]
            found = torch.autograd.grad(losses.sum(), outputs)
        factors = {
            layer: self._chosen(layer, seen[layer][0], gradient, targets, tokens)
            for layer, gradient in zip(self.layers, found, strict=True)
        }
        return losses.detach().double().cpu(), factors

    def _chosen(
        self, layer: int, keys: Tensor, gradient: Tensor, targets: TargetBatch, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        """Factors of the tokens that count; the last block computes those that are read alone."""
        keys, gradient = keys.flatten(0, -2), gradient.flatten(0, -2)
        if len(keys) == targets.batch.ids.numel():
            place = targets.read if tokens == "target" else targets.batch.real.flatten()
            place = place.to(keys.device)
            keys, gradient = keys[place], gradient[place]
        wide = torch.promote_types(keys.dtype, torch.float32)
        return keys.to(wide).cpu(), gradient.to(wide).cpu()

    @torch.no_grad()
    def _entered(self, pack: _Pack) -> Tensor | None:
        if self.layers[0] == 0:
            return None
        if pack.entered is not None:
            return pack.entered
        batch = pack.targets.batch
        entered = self.model.run(
            None,
            first=0,
            stop=self.layers[0],
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
        ).to(self.model.device_of(self.layers[0]))
        if self.keeps:
            pack.entered = entered
        return entered


@contextmanager
def watched(
    model: EditableModel, layers: Sequence[int]
) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Collect inputs and outputs of down-projections; a graph begins at the lowest one's output."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def record(layer: int) -> object:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # No weight has a gradient, so that the lowest output is the root of the graph.
            root = output if output.requires_grad else output.detach().requires_grad_()
            seen[layer] = inputs[0].detach(), root
            return root

        return hook

    with ExitStack() as stack:
        for layer in layers:
            hook = record(layer)
            handle = model.down_projection(layer).register_forward_hook(hook)  # type: ignore[arg-type]
            stack.callback(handle.remove)
        yield seen
