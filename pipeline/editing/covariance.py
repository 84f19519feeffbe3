"""The uncentred covariance of keys, C = mean over a corpus's tokens of k k^T (f x f a layer)."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.editing.batching import TokenBatch, token_batches
from pipeline.editing.keys import inputs_of
from pipeline.models.editable import EditableModel


@dataclass
class GramSums:
    """Sums over tokens: layer -> (f, f) float64 on the CPU, and how many tokens went in."""

    sums: dict[int, Tensor]
    tokens: int

    def add(self, other: "GramSums") -> None:
        """Add another shard's sums to these."""
        for layer, gram in other.sums.items():
            self.sums[layer] += gram
        self.tokens += other.tokens

    def covariances(self) -> dict[int, Tensor]:
        """Layer -> C, (f, f) float64."""
        return {layer: gram / self.tokens for layer, gram in self.sums.items()}


@torch.no_grad()
def gram_sums(
    model: EditableModel,
    layers: Sequence[int],
    rows: Sequence[Sequence[int]],
    max_tokens: int,
) -> GramSums:
    """Sum k k^T over all tokens of the rows, for all layers in one pass that ends at the last.

    Products are taken in the model's dtype or float32, whichever is wider, batch by batch, and
    added up in float64.

    Args:
        layers: blocks whose down-projection inputs are the keys.
        rows: token ids, one text each.
        max_tokens: tokens in one batch.
    """
    sums = {layer: _no_sum(model, layer) for layer in layers}
    tokens = 0
    for batch in token_batches(model, rows, max_tokens):
        for layer, keys in _keys_of(model, layers, batch).items():
            sums[layer] += keys.T @ keys
        tokens += int(batch.lengths.sum())
    return GramSums({layer: gram.cpu() for layer, gram in sums.items()}, tokens)


def _keys_of(model: EditableModel, layers: Sequence[int], batch: TokenBatch) -> dict[int, Tensor]:
    """Layer -> (real tokens, f) keys of one batch, float32 or wider."""
    with ExitStack() as stack:
        seen = {
            layer: stack.enter_context(inputs_of(model.down_projection(layer))) for layer in layers
        }
        model.run(
            None,
            first=0,
            stop=max(layers) + 1,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
        )
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    real = batch.real.flatten()
    return {
        layer: keys.reshape(len(real), -1)[real.to(keys.device)].to(wide)
        for layer, (keys,) in seen.items()
    }


def _no_sum(model: EditableModel, layer: int) -> Tensor:
    size = model.key_size(layer)
    return torch.zeros(size, size, dtype=torch.float64, device=model.device_of(layer))
