"""How far the model has moved on texts that an edit is to leave alone.

The loss of a text is the KL divergence of the edited model's next tokens from the unedited one's,
KL(unedited || edited), the mean over its places.

Shapes: T tokens, d hidden size, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.editing.batching import TokenBatch, token_batches
from pipeline.editing.gradients import RowGradients
from pipeline.editing.targets import sources_of
from pipeline.models.editable import EditableModel


@dataclass(frozen=True)
class KeptRow:
    """A text as token ids, and the positions whose next token is to stay.

    Of an encoder-decoder model they are the decoder's; `source` is what its encoder reads.
    """

    ids: tuple[int, ...]
    places: tuple[int, ...]
    source: tuple[int, ...] | None = None


@dataclass
class KeptBatch:
    """Rows of a token batch, and what the unedited model makes of them.

    Attributes:
        batch: the rows, padded.
        read: (n,) int64 indices into rows * tokens of all rows' places.
        rows: (n,) int64, the row that each belongs to.
        weight: (n,) one over the row's places.
        unedited: (n, v) log-probabilities of the unedited model.
    """

    batch: TokenBatch
    read: Tensor
    rows: Tensor
    weight: Tensor
    unedited: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, batch: TokenBatch, rows: Sequence[KeptRow], device: torch.device) -> "KeptBatch":
        """Lay out the rows of a batch; `rows` are all that its index numbers.

        Args:
            device: the model's output device, where the loss is computed.
        """
        width = batch.ids.shape[1]
        chosen = [rows[i] for i in batch.index.tolist()]
        read = [line * width + place for line, row in enumerate(chosen) for place in row.places]
        counts = torch.tensor([len(row.places) for row in chosen])
        return cls(
            batch,
            torch.tensor(read).to(device),
            torch.arange(len(chosen)).repeat_interleave(counts).to(device),
            (1.0 / counts.double()).repeat_interleave(counts).to(device),
        )

    def remember(self, model: EditableModel, states: Tensor) -> Tensor:
        """Keep what the model makes of the rows now, for `losses`; (rows, 1) zeros."""
        self.unedited = model.logits(states).log_softmax(-1)
        return self.unedited.new_zeros(len(self.batch.index), 1)

    def losses(self, model: EditableModel, states: Tensor) -> Tensor:
        assert self.unedited is not None, "remember the unedited model first"
        edited = model.logits(states).log_softmax(-1)
        apart = (self.unedited.exp() * (self.unedited - edited)).sum(dim=-1)
        apart = apart * self.weight.to(apart.dtype)
        return apart.new_zeros(len(self.batch.index)).index_add(0, self.rows, apart)


class KeptGradients(RowGradients[KeptBatch]):
    """Texts to leave alone; made while the model is unedited.

    Args:
        model: the model, unedited.
        rows: the texts.
        layers: blocks whose down-projections count, ascending.
        max_tokens: tokens in one batch.
    """

    def __init__(
        self,
        model: EditableModel,
        rows: Sequence[KeptRow],
        layers: tuple[int, ...],
        max_tokens: int,
    ) -> None:
        batches = token_batches(model, [row.ids for row in rows], max_tokens, sources_of(rows))
        made = [KeptBatch.of(batch, rows, model.output_device) for batch in batches]
        super().__init__(model, made, range(len(rows)), len(rows), layers)
        self.read(lambda batch, states: batch.remember(model, states))
