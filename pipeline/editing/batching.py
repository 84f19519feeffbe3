"""Rows of token ids in right-padded batches with little padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.models.editable import EditableModel
from pipeline.models.masks import plain_segments


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded rows, on the model's input device.

    Attributes:
        index: (rows,) int64, which of the caller's rows these are; on the CPU.
        ids: (rows, tokens) int64.
        lengths: (rows,) int64.
        positions: (rows, tokens) int64.
        masks: what the model takes as attention masks.
    """

    index: Tensor
    ids: Tensor
    lengths: Tensor
    positions: Tensor
    masks: Any

    @property
    def real(self) -> Tensor:
        """(rows, tokens) bool, False at padding."""
        width = torch.arange(self.ids.shape[1], device=self.ids.device)
        return width < self.lengths[:, None]

    @property
    def last(self) -> Tensor:
        """(rows,) int64 index of every row's last token in rows * tokens."""
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        return rows * self.ids.shape[1] + self.lengths - 1


def token_batches(
    model: EditableModel, rows: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[TokenBatch]:
    """Cut rows, shortest first, into batches of at most `max_tokens` tokens, padding counted.

    A row longer than `max_tokens` makes a batch of its own. The order depends on the rows only.
    """
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    batch: list[int] = []
    for i in order:
        if batch and len(rows[i]) * (len(batch) + 1) > max_tokens:
            yield make_batch(model, rows, batch)
            batch = []
        batch.append(i)
    if batch:
        yield make_batch(model, rows, batch)


def make_batch(
    model: EditableModel, rows: Sequence[Sequence[int]], index: Sequence[int]
) -> TokenBatch:
    """Pad the chosen rows on the right with id 0, which the mask hides."""
    lengths = torch.tensor([len(rows[i]) for i in index])
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(rows[i], dtype=torch.long) for i in index], batch_first=True
    )
    device = model.input_device
    ids, lengths = ids.to(device), lengths.to(device)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    masks = model.masks(positions, plain_segments(lengths, ids.shape[1]))
    return TokenBatch(torch.tensor(index), ids, lengths, positions, masks)
