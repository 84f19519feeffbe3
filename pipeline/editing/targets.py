"""Requests as rows with a target behind them: which positions predict it, and what that costs.

Shapes: N rows, T tokens, d hidden size, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from pipeline.editing.batching import TokenBatch
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

Read = Literal["target_tokens", "last_prompt_token"]
"""Where a target's tokens are predicted: each behind the ones before it, or all of them at the
prompt's last token, as the fine-tuning baseline of arXiv 2202.05262 does it in its code. Where an
encoder reads the prompt, the decoder's start token is the last one before the target."""


@dataclass(frozen=True)
class TargetRow:
    """One row of tokens, and what is to be predicted in it.

    Attributes:
        edit: the number of the edit that it is of.
        ids: token ids; the target's own follow the prompt's, but for the last.
        places: for each target token the position that predicts it.
        labels: the target tokens.
        weight: of the row in its edit's loss; an edit's rows add up to 1.
        source: token ids that an encoder reads, of an encoder-decoder model.
    """

    edit: int
    ids: tuple[int, ...]
    places: tuple[int, ...]
    labels: tuple[int, ...]
    weight: float
    source: tuple[int, ...] | None = None


def target_rows(edits: Sequence[EditPrompts], read: Read) -> list[TargetRow]:
    """Every edit behind every context template, the templates weighing alike."""
    return [
        target_row(number, prompt.ids, edit.target, 1.0 / len(edit.rewrites), edit.start, read)
        for number, edit in enumerate(edits)
        for prompt in edit.rewrites
    ]


def target_row(
    number: int,
    prompt: tuple[int, ...],
    target: tuple[int, ...],
    weight: float,
    start: int | None,
    read: Read = "target_tokens",
) -> TargetRow:
    """A prompt with a target to be predicted behind it, or by the decoder that begins with `start`.

    Args:
        number, weight: the row's `edit` and `weight`.
        prompt, target: token ids.
        start: see `AnswerForm`.
        read: where the target is predicted.
    """
    source = None
    if start is not None:
        source, prompt = prompt, (start,)
    last = len(prompt) - 1
    if read == "last_prompt_token":
        return TargetRow(number, prompt, (last,) * len(target), target, weight, source)
    places = tuple(range(last, last + len(target)))
    return TargetRow(number, (*prompt, *target[:-1]), places, target, weight, source)


class Sourced(Protocol):
    """A row that an encoder may have read something for."""

    @property
    def source(self) -> tuple[int, ...] | None:
        """Token ids that the encoder reads; None where there is no encoder."""
        ...


def sources_of(rows: Sequence[Sourced]) -> list[tuple[int, ...]] | None:
    """What an encoder reads of each row; None where there is no encoder."""
    sources = [row.source for row in rows if row.source is not None]
    assert len(sources) in (0, len(rows)), "rows of two kinds of models"
    return sources or None


@dataclass(frozen=True)
class TargetBatch:
    """The rows of a token batch, and where its loss is read.

    Attributes:
        batch: the rows, padded.
        read: (n,) int64 distinct indices into rows * tokens, ascending: states that are read.
        slots: (targets,) int64, the state among `read` that predicts each target token.
        labels: (targets,) int64.
        rows: (targets,) int64, the row of the batch that each belongs to.
        weight: (targets,) float64, weight of each in its edit's loss.
        smoothing: share of a target's probability that all tokens of the vocabulary have alike.
    """

    batch: TokenBatch
    read: Tensor
    slots: Tensor
    labels: Tensor
    rows: Tensor
    weight: Tensor
    smoothing: float = 0.0

    @classmethod
    def of(
        cls,
        batch: TokenBatch,
        rows: Sequence[TargetRow],
        device: torch.device,
        smoothing: float = 0.0,
    ) -> "TargetBatch":
        """Lay out the rows of a batch; `rows` are all that its index numbers.

        Args:
            device: the model's output device, where the loss is computed.
        """
        width = batch.ids.shape[1]
        chosen = [rows[i] for i in batch.index.tolist()]
        flat = [line * width + place for line, row in enumerate(chosen) for place in row.places]
        read, slots = torch.tensor(flat).unique(return_inverse=True)
        counts = torch.tensor([len(row.labels) for row in chosen])
        shares = [row.weight / len(row.labels) for row in chosen]
        weights = torch.tensor(shares, dtype=torch.float64)
        return cls(
            batch,
            read.to(device),
            slots.to(device),
            torch.tensor([label for row in chosen for label in row.labels]).to(device),
            torch.arange(len(chosen)).repeat_interleave(counts).to(device),
            weights.repeat_interleave(counts).to(device),
            smoothing,
        )

    def losses(self, model: EditableModel, states: Tensor) -> Tensor:
        """Weighted negative log-likelihoods, (rows,), nats; float32 or wider.

        Args:
            states: (n, d) normed hidden states at `read`.
        """
        likely = model.logits(states).log_softmax(-1)
        found = likely[self.slots, self.labels]
        if self.smoothing:
            alike = likely.mean(dim=-1)[self.slots]
            found = (1.0 - self.smoothing) * found + self.smoothing * alike
        return self._by_row(-found * self.weight.to(found.dtype))

    def losses_and_misses(self, model: EditableModel, states: Tensor) -> Tensor:
        """(rows, 2): unsmoothed `losses`, and weighted how many targets are not the likeliest."""
        likely = model.logits(states).log_softmax(-1)
        misses = likely.argmax(dim=-1)[self.slots] != self.labels
        weight = self.weight.to(likely.dtype)
        both = (-likely[self.slots, self.labels] * weight, misses * weight)
        return torch.stack([self._by_row(one) for one in both], dim=1)

    def _by_row(self, of_targets: Tensor) -> Tensor:
        return of_targets.new_zeros(len(self.batch.index)).index_add(0, self.rows, of_targets)
