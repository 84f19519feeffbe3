"""Keys and residuals: the inputs of the MLP down-projections at the subjects' last tokens.

One wave goes up through the blocks: all rows wait at the key of the layer that is edited next, and
go on once its update has arrived, so that no block runs twice (docs/design.md). Only tokens up to
the subject's last one are carried; later ones cannot influence it.

Shapes: N edits, f key size, d hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.editing.batching import TokenBatch, token_batches
from pipeline.models.editable import EditableModel
from pipeline.models.halfway import (
    Halfway,
    finish_block,
    recorded_halfway,
    without_down_projection,
)
from pipeline.prompts import EditPrompts

Kept = Literal["keys", "hidden", "nothing"]
"""What rows keep while they wait at a layer: all that it takes to finish its block (2 d + f numbers
a token), the block's input (d), from which it runs again, or nothing: they start over."""

Written = Literal["block", "down_projection"]


@dataclass
class _Pack:
    """A batch of rows, and the block in which they wait at their keys."""

    batch: TokenBatch
    half: Halfway | None = None
    layer: int = -1


class KeyWave:
    """The rows of N edits on their way up through a model whose layers are edited one by one.

    Args:
        model: the model; every call sees the weights that it has at that time.
        edits: tokenised requests, N of them.
        last_layer: the block L at whose output the residual is measured.
        max_tokens: tokens in one batch.
        keep: what is held between calls; the less, the more runs again, to the same bits.
        written: where the values belong: the output of block L, or of its down-projection.
    """

    def __init__(
        self,
        model: EditableModel,
        edits: Sequence[EditPrompts],
        last_layer: int,
        *,
        max_tokens: int,
        keep: Kept = "keys",
        written: Written = "block",
    ) -> None:
        self.model, self.last_layer, self.keep = model, last_layer, keep
        self.written = written
        self.num_edits = len(edits)
        bare = [edit.rewrites[0] for edit in edits]
        others = [row for edit in edits for row in edit.rewrites[1:]]
        self.num_others = len(others) // max(1, len(edits))
        self._bare = _packs(model, [row.ids[: row.lookup + 1] for row in bare], max_tokens)
        self._others = _packs(model, [row.ids[: row.lookup + 1] for row in others], max_tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes that the kept states take, or will take once there are any."""
        tokens = sum(pack.batch.ids.numel() for pack in (*self._bare, *self._others))
        hidden = self.model.hidden_size
        widths = {
            "keys": 2 * hidden + self.model.key_size(self.last_layer),
            "hidden": hidden,
            "nothing": 0,
        }
        return tokens * widths[self.keep] * self.model.dtype.itemsize

    def keep_less(self, keep: Kept) -> None:
        """Hold less from now on, and let go of what is held beyond that."""
        self.keep = keep
        for pack in (*self._bare, *self._others):
            if keep == "nothing":
                pack.half = None
            elif keep == "hidden" and pack.half is not None:
                pack.half.keep_input()

    @torch.no_grad()
    def read(self, layer: int, *, in_groups: bool = True) -> tuple[Tensor, Tensor]:
        """Read the keys at `layer` and the hidden states at the output of block L.

        Layers are to be asked for in ascending order, each after the updates of the ones before;
        asking for one again gives the same bits.

        Args:
            layer: the block.
            in_groups: take the mean over the groups {bare prompt} and {the other contexts} of the
                mean within the group (MEMIT, arXiv 2210.07229, equation 19 and its published code);
                else the mean over all contexts alike (ROME, arXiv 2202.05262, equation 3).

        Returns:
            keys: (N, f) in the model's dtype, on the layer's device.
            hidden: (N, d) in the model's dtype, on block L's device, at the bare prompt's lookup
                token; what the down-projection of block L puts out, where that is `written`.
        """
        keys, hidden = self.read_bare(layer)
        if self.num_others:
            others = 1 if in_groups else self.num_others
            keys = (keys + others * self._mean_of_others(layer)) / (1 + others)
        return keys, hidden

    @torch.no_grad()
    def read_bare(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same with the bare prompts' own keys."""
        keys = self._empty(self.num_edits, self.model.key_size(layer), layer)
        hidden = self._empty(self.num_edits, self.model.hidden_size, self.last_layer)
        for pack in self._bare:
            key, output = self._read_pack(pack, layer, self.last_layer + 1)
            keys[pack.batch.index], hidden[pack.batch.index] = key, output
        return keys, hidden

    def _mean_of_others(self, layer: int) -> Tensor:
        keys = self._empty(self.num_edits * self.num_others, self.model.key_size(layer), layer)
        for pack in self._others:
            with without_down_projection(self.model, layer):
                keys[pack.batch.index], _ = self._read_pack(pack, layer, layer + 1)
        return keys.view(self.num_edits, self.num_others, -1).mean(dim=1)

    def _read_pack(self, pack: _Pack, layer: int, stop: int) -> tuple[Tensor, Tensor]:
        """Run a pack up to `stop`: its keys (rows, f) at `layer`, and the last block's output."""
        hidden = self._bring_to(pack, layer)
        # Block L is the last one that anything is read of, and only at the rows' last tokens.
        last = pack.batch.last
        read = last if stop == self.last_layer + 1 else None
        down_projection = self.model.down_projection(self.last_layer)
        with recorded_halfway(self.model, layer) as half, outputs_of(down_projection) as seen:
            output = self._run(pack, hidden, layer, stop, read)
        assert output is not None
        if read is not None and self.written == "down_projection":
            (output,) = (states.flatten(0, -2) for states in seen)
            output = output if len(output) == len(last) else output[last.to(output.device)]
        key = half.key.flatten(0, -2)
        if self.keep == "nothing" or layer == self.last_layer:
            pack.half = None
        else:
            pack.half, pack.layer = half, layer
            if self.keep == "hidden":
                half.keep_input()
        return key if len(key) == len(last) else key[last.to(key.device)], output

    def _bring_to(self, pack: _Pack, layer: int) -> Tensor | None:
        """The pack's states at the input of `layer`; None where those are the embeddings."""
        if pack.half is None or pack.layer > layer:
            return self._run(pack, None, 0, layer)
        if pack.layer == layer:
            return pack.half.hidden
        if not pack.half.is_whole:
            return self._run(pack, pack.half.hidden, pack.layer, layer)
        batch = pack.batch
        hidden = finish_block(
            self.model, pack.layer, pack.half, masks=batch.masks, position_ids=batch.positions
        )
        return self._run(pack, hidden, pack.layer + 1, layer)

    def _run(
        self, pack: _Pack, hidden: Tensor | None, first: int, stop: int, read: Tensor | None = None
    ) -> Tensor | None:
        if first == stop:
            return hidden
        return self.model.run(
            hidden,
            first=first,
            stop=stop,
            masks=pack.batch.masks,
            position_ids=pack.batch.positions,
            input_ids=pack.batch.ids if hidden is None else None,
            read=read,
        )

    def _empty(self, rows: int, width: int, layer: int) -> Tensor:
        device = self.model.device_of(layer)
        return torch.empty(rows, width, dtype=self.model.dtype, device=device)


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a module returns while the context is open."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


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
