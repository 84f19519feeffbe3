"""Keys and residuals: the inputs of the MLP down-projections at the subjects' last tokens.

One wave goes up through the blocks: the hidden states of all rows wait at the input of the layer
that is edited next, and go on once its update has arrived (docs/design.md). Only tokens up to the
subject's last one are carried; later ones cannot influence it.

Shapes: N edits, f key size, d hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.editing.batching import TokenBatch, token_batches
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts


@dataclass
class _Pack:
    """A batch of rows, and how far up the model its hidden states are."""

    batch: TokenBatch
    hidden: Tensor | None = None
    depth: int = 0


class KeyWave:
    """The rows of N edits on their way up through a model whose layers are edited one by one.

    Args:
        model: the model; every call sees the weights that it has at that time.
        edits: tokenised requests, N of them.
        last_layer: the block L at whose output the residual is measured.
        max_tokens: tokens in one batch.
        keep_hidden: hold hidden states between calls; without, every call starts from the
            embeddings, which costs time and saves memory. The results are the same bits.
    """

    def __init__(
        self,
        model: EditableModel,
        edits: Sequence[EditPrompts],
        last_layer: int,
        *,
        max_tokens: int,
        keep_hidden: bool = True,
    ) -> None:
        self.model, self.last_layer, self.keep_hidden = model, last_layer, keep_hidden
        self.num_edits = len(edits)
        bare = [edit.rewrites[0] for edit in edits]
        others = [row for edit in edits for row in edit.rewrites[1:]]
        self.num_others = len(others) // max(1, len(edits))
        self._bare = _packs(model, [row.ids[: row.lookup + 1] for row in bare], max_tokens)
        self._others = _packs(model, [row.ids[: row.lookup + 1] for row in others], max_tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes that the kept hidden states take, or will take once there are any."""
        tokens = sum(pack.batch.ids.numel() for pack in (*self._bare, *self._others))
        width = self.model.hidden_size * self.model.dtype.itemsize
        return tokens * width if self.keep_hidden else 0

    @torch.no_grad()
    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Read the keys at `layer` and the hidden states at the output of block L.

        Layers must be asked for in ascending order, each after the updates of the ones before.

        Returns:
            keys: (N, f) in the model's dtype: the mean over the groups {bare prompt} and {the other
                contexts} of the mean within the group (MEMIT, arXiv 2210.07229, equation 19 and its
                published code).
            hidden: (N, d) in the model's dtype, at the bare prompt's lookup token.
        """
        keys = self._empty(self.num_edits, self.model.key_size(layer))
        hidden = self._empty(self.num_edits, self.model.hidden_size)
        for pack in self._bare:
            with inputs_of(self.model.down_projection(layer)) as seen:
                output = self._forward(pack, layer, self.last_layer + 1)
            keys[pack.batch.index] = _at_last(seen[0], pack.batch)
            hidden[pack.batch.index] = _at_last(output, pack.batch)
        if self.num_others:
            keys = (keys + self._mean_of_others(layer)) / 2
        return keys, hidden

    def _mean_of_others(self, layer: int) -> Tensor:
        keys = self._empty(self.num_edits * self.num_others, self.model.key_size(layer))
        for pack in self._others:
            with inputs_of(self.model.down_projection(layer)) as seen:
                self._forward(pack, layer, layer + 1)
            keys[pack.batch.index] = _at_last(seen[0], pack.batch)
        return keys.view(self.num_edits, self.num_others, -1).mean(dim=1)

    def _forward(self, pack: _Pack, layer: int, stop: int) -> Tensor:
        """Bring a pack to the input of `layer`, remember it there, and go on up to `stop`."""
        waiting = self._run(pack, pack.hidden, pack.depth, layer)
        if self.keep_hidden:
            pack.hidden, pack.depth = waiting, layer
        output = self._run(pack, waiting, layer, stop)
        assert output is not None
        return output

    def _run(self, pack: _Pack, hidden: Tensor | None, first: int, stop: int) -> Tensor | None:
        if first == stop:
            return hidden
        return self.model.run(
            hidden,
            first=first,
            stop=stop,
            masks=pack.batch.masks,
            position_ids=pack.batch.positions,
            input_ids=pack.batch.ids if hidden is None else None,
        )

    def _empty(self, rows: int, width: int) -> Tensor:
        return torch.empty(rows, width, dtype=self.model.dtype, device=self.model.device)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module is called with while the context is open."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _packs(model: EditableModel, rows: Sequence[Sequence[int]], max_tokens: int) -> list[_Pack]:
    return [_Pack(batch) for batch in token_batches(model, rows, max_tokens)]


def _at_last(states: Tensor, batch: TokenBatch) -> Tensor:
    """The state at every row's last token: (rows, width). OPT flattens rows and tokens."""
    rows = torch.arange(len(batch.lengths), device=states.device)
    shaped = states.view(*batch.ids.shape, states.shape[-1])
    return shaped[rows, batch.lengths - 1]
