"""Gradients of a loss in the down-projections, as factors; the loss is the target's as a rule.

Of a linear layer y = W k the gradient in W is a sum over tokens of g k^T, g the gradient in y. The
factors are far smaller than the sum where edits are short, and some methods work on them (MEND,
arXiv 2110.11309, equation 3). Blocks below the lowest edited layer do not change while an update is
looked for, so what they put out is kept; so is what an encoder puts out.

Shapes: N edits, R tokens whose factors are taken, F key size, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.editing.batching import TokenBatch, token_batches
from pipeline.editing.targets import Read, TargetBatch, sources_of, target_rows
from pipeline.models.editable import EditableModel, forward_replaced
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
    """A batch of rows; what is kept of it is what `_entered` returns."""

    of: B
    kept: tuple[Any, Tensor | None] | None = None


class RowGradients(Generic[B]):
    """Rows whose loss is taken again and again, with its gradients, while the weights change.

    Args:
        model: the model; every call sees the edited weights that it has at that time.
        batches: the rows.
        numbers: for every row of all batches, the one of `count` things (edits) that it is of.
        count: these things.
        layers: blocks whose down-projections count, ascending.
        keeps: whether what enters the lowest edited block is kept between calls, and what an
            encoder puts out.
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
        self._apart: tuple[Mapping[int, Tensor], int] = {}, 1

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept between calls, once it is."""
        if not self.keeps:
            return 0
        batches = [pack.of.batch for pack in self._packs]
        tokens = sum(batch.ids.numel() for batch in batches)
        size = tokens * self.model.hidden_size * self.model.dtype.itemsize
        return size + sum(self.model.ready_bytes(batch.masks) for batch in batches)

    def factors(self, tokens: Tokens) -> Factors:
        """Run all rows forwards and backwards."""
        losses, rows = self._rows(tokens)
        return Factors(
            losses,
            {layer: keys for layer, (keys, _, _) in rows.items()},
            {layer: gradients for layer, (_, gradients, _) in rows.items()},
        )

    def factors_apart(self, tokens: Tokens, size: int) -> list[Factors]:
        """The same in one go for every `size` things in a row, which `count` is a multiple of."""
        losses, rows = self._rows(tokens)
        found = []
        for start in range(0, self._count, size):
            chosen = {
                layer: (numbers >= start) & (numbers < start + size)
                for layer, (_, _, numbers) in rows.items()
            }
            found.append(
                Factors(
                    losses[start : start + size],
                    {layer: keys[chosen[layer]] for layer, (keys, _, _) in rows.items()},
                    {layer: grown[chosen[layer]] for layer, (_, grown, _) in rows.items()},
                )
            )
        return found

    def _rows(self, tokens: Tokens) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor, Tensor]]]:
        """All things' losses, and each layer's keys, gradients and whose they are, (R,) int64."""
        losses = torch.zeros(self._count, dtype=torch.float64)
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {k: [] for k in self.layers}
        for pack in self._packs:
            of_rows, found = self._backward(pack, tokens)
            losses.index_add_(0, self._numbers_of(pack), of_rows)
            for layer, part in found.items():
                parts[layer].append(part)
        joined = {
            layer: tuple(torch.cat(side) for side in zip(*found, strict=True))
            for layer, found in parts.items()
        }
        return losses, joined  # type: ignore[return-value]

    @contextmanager
    def weights_apart(self, weights: Mapping[int, Tensor], size: int) -> Iterator[None]:
        """Let every `size` things in a row have weights of their own for a while.

        Args:
            weights: layer -> (count / size, D, F), in the model's type and on the layer's device.
            size: see above.
        """
        self._apart = weights, size
        try:
            yield
        finally:
            self._apart = {}, 1

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
        batch, (masks, entered) = pack.of.batch, self._entered(pack)
        with self._own_weights(pack):
            return self.model.final(
                entered,
                first=self.layers[0],
                masks=masks,
                position_ids=batch.positions,
                input_ids=batch.ids if entered is None else None,
                read=pack.of.read,
            )

    @contextmanager
    def _own_weights(self, pack: _Pack[B]) -> Iterator[None]:
        """Let every row of a batch have the weights of its own thing, if there are such."""
        weights, size = self._apart
        if not weights:
            yield
            return
        owners = (self._numbers_of(pack) // size).tolist()
        rows, width = pack.of.batch.ids.shape
        read = torch.bincount(pack.of.read.cpu() // width, minlength=rows).tolist()

        def forward_of(layer: int, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
            def forward(keys: Tensor) -> Tensor:
                flat = keys.flatten(0, -2)
                # The last block computes the states that are read alone.
                counts = [width] * rows if len(flat) == rows * width else read
                outputs = [
                    nn.functional.linear(part, weights[layer][owner], bias)
                    for part, owner in zip(flat.split(counts), owners, strict=True)
                ]
                return torch.cat(outputs).view(*keys.shape[:-1], -1)

            return forward

        with ExitStack() as stack:
            for layer in weights:
                module = self.model.down_projection(layer)
                forward = forward_of(layer, getattr(module, "bias", None))
                stack.enter_context(forward_replaced(module, forward))
            yield

    def _backward(
        self, pack: _Pack[B], tokens: Tokens
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor, Tensor]]]:
        """Losses of a batch's rows, and each layer's factors with whose they are."""
        with torch.enable_grad(), watched(self.model, self.layers) as seen:
            losses = pack.of.losses(self.model, self._final(pack))
            outputs = [seen[layer][1] for layer in self.layers]
            found = torch.autograd.grad(losses.sum(), outputs)
        factors = {
            layer: self._chosen(seen[layer][0], gradient, pack, tokens)
            for layer, gradient in zip(self.layers, found, strict=True)
        }
        return losses.detach().double().cpu(), factors

    def _chosen(
        self, keys: Tensor, gradient: Tensor, pack: _Pack[B], tokens: Tokens
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of the tokens that count; the last block computes those that are read alone."""
        keys, gradient = keys.flatten(0, -2), gradient.flatten(0, -2)
        batch, place = pack.of.batch, pack.of.read
        if len(keys) == batch.ids.numel():
            place = place if tokens == "target" else batch.real.flatten().nonzero().flatten()
            place = place.to(keys.device)
            keys, gradient = keys[place], gradient[place]
        numbers = self._numbers_of(pack)[place.cpu() // batch.ids.shape[1]]
        wide = torch.promote_types(keys.dtype, torch.float32)
        return keys.to(wide).cpu(), gradient.to(wide).cpu(), numbers

    @torch.no_grad()
    def _entered(self, pack: _Pack[B]) -> tuple[Any, Tensor | None]:
        """What the rows attend to, and the lowest edited block's input (None for block 0)."""
        if pack.kept is not None:
            return pack.kept
        batch, entered = pack.of.batch, None
        masks = self.model.ready(batch.masks)
        if self.layers[0] > 0:
            entered = self.model.run(
                None,
                first=0,
                stop=self.layers[0],
                masks=masks,
                position_ids=batch.positions,
                input_ids=batch.ids,
            ).to(self.model.device_of(self.layers[0]))
        if self.keeps:
            pack.kept = masks, entered
        return masks, entered


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
        ids, sources = [row.ids for row in rows], sources_of(rows)
        batches = token_batches(model, ids, max_tokens, sources)
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
