"""Gradients of a loss in the down-projections, as factors; the loss is the target's as a rule.

Of a linear layer y = W k the gradient in W is a sum over tokens of g k^T, g the gradient in y. The
factors are far smaller than the sum where edits are short, and some methods work on them (MEND,
arXiv 2110.11309, equation 3). Blocks below the lowest edited layer do not change while an update is
looked for, so what they put out is kept.

Shapes: N edits, R tokens whose factors are taken, F key size, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.editing.batching import TokenBatch, token_batches
from pipeline.editing.targets import Read, TargetBatch, target_rows
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

Tokens = Literal["all", "target"]
"""Whose factors are taken: every token's, or only those that predict a target token."""


@dataclass(frozen=True)
class Condition:
    """An edit in words, as token embeddings (T, width), float32 on the CPU.

    Attributes:
        old: what the model answers.
        new: what it shall answer.
        prompt: what it is asked.
    """

    old: Tensor
    new: Tensor
    prompt: Tensor


@dataclass(frozen=True)
class Factors:
    """What N edits say about the weights of some layers.

    Attributes:
        losses: (N,) float64 loss of every edit, nats a target token.
        keys: layer -> (R, F) float32 or wider, on the CPU.
        gradients: layer -> (R, D), the gradient of the sum of all losses in the layer's output.
        conditions: the edits in words, for a method that reads them; else none.
    """

    losses: Tensor
    keys: dict[int, Tensor]
    gradients: dict[int, Tensor]
    conditions: tuple[Condition, ...] = ()

    @classmethod
    def joined(cls, parts: "Sequence[Factors]") -> "Factors":
        """Those of all parts' edits, in their order."""
        layers = list(parts[0].keys)
        return cls(
            torch.cat([part.losses for part in parts]),
            {layer: torch.cat([part.keys[layer] for part in parts]) for layer in layers},
            {layer: torch.cat([part.gradients[layer] for part in parts]) for layer in layers},
            tuple(condition for part in parts for condition in part.conditions),
        )

    def to(self, device: torch.device) -> "Factors":
        """The same on a device; losses stay."""
        return Factors(
            self.losses,
            {layer: keys.to(device) for layer, keys in self.keys.items()},
            {layer: gradients.to(device) for layer, gradients in self.gradients.items()},
            self.conditions,
        )

    def matrix(self, layer: int) -> Tensor:
        """The gradient of the summed losses in a layer's weight, (D, F) float64."""
        return self.gradients[layer].double().T @ self.keys[layer].double()


class ReadBatch(Protocol):
    """Rows of tokens with a loss that is read at some of their states."""

    @property
    def batch(self) -> TokenBatch:
        """The rows, padded."""
        ...

    @property
    def read(self) -> Tensor:
        """(n,) int64 distinct indices into rows * tokens, ascending."""
        ...

    def losses(self, model: EditableModel, states: Tensor) -> Tensor:
        """(rows,) loss of each, from the (n, d) normed hidden states at `read`."""
        ...


B = TypeVar("B", bound=ReadBatch)


@dataclass
class _Pack(Generic[B]):
    """A batch of rows, and what enters the lowest edited block."""

    of: B
    entered: Tensor | None = None


class RowGradients(Generic[B]):
    """Rows whose loss is taken again and again, with its gradients, while the weights change.

    Args:
        model: the model; every call sees the edited weights that it has at that time.
        batches: the rows.
        numbers: for every row of all batches, the one of `count` things (edits) that it is of.
        count: these things.
        layers: blocks whose down-projections count, ascending.
        keeps: whether what enters the lowest edited block is kept between calls.
    """

    def __init__(
        self,
        model: EditableModel,
        batches: Sequence[B],
        numbers: Sequence[int],
        count: int,
        layers: tuple[int, ...],
        *,
        keeps: bool = True,
    ) -> None:
        self.model, self.layers, self.keeps = model, layers, keeps
        self._numbers, self._count = numbers, count
        self._packs: list[_Pack[B]] = [_Pack(batch) for batch in batches]

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept between calls, once it is."""
        tokens = sum(pack.of.batch.ids.numel() for pack in self._packs)
        return tokens * self.model.hidden_size * self.model.dtype.itemsize if self.keeps else 0

    def factors(self, tokens: Tokens) -> Factors:
        """Run all rows forwards and backwards."""
        losses = torch.zeros(self._count, dtype=torch.float64)
        keys: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        gradients: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for pack in self._packs:
            of_rows, found = self._backward(pack, tokens)
            losses.index_add_(0, self._numbers_of(pack), of_rows)
            for layer, (key, gradient) in found.items():
                keys[layer].append(key)
                gradients[layer].append(gradient)
        return Factors(
            losses,
            {layer: torch.cat(parts) for layer, parts in keys.items()},
            {layer: torch.cat(parts) for layer, parts in gradients.items()},
        )

    @torch.no_grad()
    def read(self, of: Callable[[B, Tensor], Tensor]) -> Tensor:
        """Run all rows forwards only.

        Args:
            of: makes (rows, m) numbers of a batch and its (n, d) normed hidden states.

        Returns:
            (count, m) float64, the sums over each thing's rows.
        """
        found: Tensor | None = None
        for pack in self._packs:
            values = of(pack.of, self._final(pack)).double().cpu()
            if found is None:
                found = values.new_zeros(self._count, values.shape[1])
            found.index_add_(0, self._numbers_of(pack), values)
        assert found is not None, "there are rows"
        return found

    def _numbers_of(self, pack: _Pack[B]) -> Tensor:
        return torch.tensor([self._numbers[row] for row in pack.of.batch.index.tolist()])

    def _final(self, pack: _Pack[B]) -> Tensor:
        """Normed hidden states where a batch is read."""
        batch, entered = pack.of.batch, self._entered(pack)
        return self.model.final(
            entered,
            first=self.layers[0],
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids if entered is None else None,
            read=pack.of.read,
        )

    def _backward(
        self, pack: _Pack[B], tokens: Tokens
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """Losses of a batch's rows, and each layer's factors."""
        with torch.enable_grad(), watched(self.model, self.layers) as seen:
            losses = pack.of.losses(self.model, self._final(pack))
            outputs = [seen[layer][1] for layer in self.layers]
            found = torch.autograd.grad(losses.sum(), outputs)
        factors = {
            layer: self._chosen(seen[layer][0], gradient, pack.of, tokens)
            for layer, gradient in zip(self.layers, found, strict=True)
        }
        return losses.detach().double().cpu(), factors

    def _chosen(
        self, keys: Tensor, gradient: Tensor, of: B, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        """Factors of the tokens that count; the last block computes those that are read alone."""
        keys, gradient = keys.flatten(0, -2), gradient.flatten(0, -2)
        if len(keys) == of.batch.ids.numel():
            place = of.read if tokens == "target" else of.batch.real.flatten()
            place = place.to(keys.device)
            keys, gradient = keys[place], gradient[place]
        wide = torch.promote_types(keys.dtype, torch.float32)
        return keys.to(wide).cpu(), gradient.to(wide).cpu()

    @torch.no_grad()
    def _entered(self, pack: _Pack[B]) -> Tensor | None:
        if self.layers[0] == 0:
            return None
        if pack.entered is not None:
            return pack.entered
        batch = pack.of.batch
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


class TargetGradients(RowGradients[TargetBatch]):
    """The rows of N edits' targets.

    Args:
        model, layers, keeps: as of `RowGradients`.
        edits: tokenised requests, N of them.
        read: where the target is predicted.
        max_tokens: tokens in one batch.
        smoothing: of the labels, see `TargetBatch`.
    """

    def __init__(
        self,
        model: EditableModel,
        edits: Sequence[EditPrompts],
        layers: tuple[int, ...],
        read: Read,
        max_tokens: int,
        keeps: bool = True,
        smoothing: float = 0.0,
    ) -> None:
        self.edits = edits
        rows = target_rows(edits, read)
        batches = token_batches(model, [row.ids for row in rows], max_tokens)
        device = model.output_device
        super().__init__(
            model,
            [TargetBatch.of(batch, rows, device, smoothing) for batch in batches],
            [row.edit for row in rows],
            len(edits),
            layers,
            keeps=keeps,
        )


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
