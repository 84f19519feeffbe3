"""The edits at work in a value search: what they are, where they stand, and how they leave.

Shapes: G searches in the batch, B edits (as many, unless edits are merged: `members.py`), V places
that a delta is added at (1 or 2), d hidden size, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.editing.members import Members, rows_of
from pipeline.editing.suffixes import SuffixBatch, on_its_device


@dataclass(frozen=True)
class ValueSettings:
    """Settings of the search; names and meaning as in the job spec's `method.value`."""

    steps: int
    learning_rate: float
    weight_decay: float
    kl_weight: float
    clamp_norm: float
    stop_loss: float
    stop_when_predicted: bool = False
    warm_start: bool = False
    inside_block: bool = False
    """Search two deltas, at the down-projection's and at attention's output (PMET), not one at the
    block's; once the target is predicted its likelihood counts a tenth."""


class Ended(NamedTuple):
    """How one search ended: its number, (d,) h0, (V, d) anchor and delta, and what is reported."""

    number: int
    hidden: Tensor
    anchor: Tensor
    delta: Tensor
    steps: int
    loss: float
    probability: float


@dataclass
class SearchBatch:
    """The edits at work; every tensor's first dimension is G.

    They are where block L is, `reference` where the model puts out its logits.

    Attributes:
        suffixes: what does not change during their search; its first dimension is B.
        sizes: edits of each search.
        hidden: (G, d) h0 of the first edit of each search.
        anchor: (G, V, d) what its deltas are added to: h0 itself, or the outputs inside the block.
        delta, first_moment, second_moment: (G, V, d), Adam's state.
        likelihood_weight: (G,) weight of the target's likelihood in the loss.
        reference: (G, v) the unedited model's log-probabilities at the essence row.
        passes: (G,) forward passes done.
        searching: (G,) bool, False once a stop rule holds.
        best_delta, steps, loss, probability: what is reported, as of the last pass while searching.
    """

    suffixes: SuffixBatch
    sizes: tuple[int, ...]
    hidden: Tensor
    anchor: Tensor
    delta: Tensor
    first_moment: Tensor
    second_moment: Tensor
    likelihood_weight: Tensor
    reference: Tensor
    passes: Tensor
    searching: Tensor
    best_delta: Tensor
    steps: Tensor
    loss: Tensor
    probability: Tensor

    @classmethod
    def of(cls, suffixes: SuffixBatch, sizes: Sequence[int], vocab_size: int) -> "SearchBatch":
        """Edits that have not begun."""
        members, halves = Members(sizes, suffixes.anchor.device), suffixes.halves
        hidden = members.first(suffixes.anchor)
        anchor = hidden[:, None] if halves is None else members.first(halves.anchor())
        state, count = torch.zeros_like(anchor), anchor.new_zeros(len(anchor))
        return cls(
            suffixes=suffixes,
            sizes=tuple(sizes),
            hidden=hidden,
            anchor=anchor,
            delta=state,
            first_moment=state.clone(),
            second_moment=state.clone(),
            likelihood_weight=torch.ones_like(count),
            reference=torch.zeros(
                len(anchor), vocab_size, dtype=anchor.dtype, device=suffixes.target_ids.device
            ),
            passes=count.long(),
            searching=torch.ones_like(count, dtype=torch.bool),
            best_delta=state.clone(),
            steps=count.long(),
            loss=count,
            probability=count.clone(),
        )

    def members(self) -> Members:
        """Which edits search together; waits for the device."""
        return Members(self.sizes, self.anchor.device)

    def select(self, keep: Sequence[int]) -> "SearchBatch":
        """The same for some of the searches."""
        chosen = torch.tensor(keep, device=self.anchor.device)
        rows = torch.tensor(rows_of(self.sizes, keep), device=self.anchor.device)
        return replace(
            self,
            suffixes=self.suffixes.select(rows),
            sizes=tuple(self.sizes[search] for search in keep),
            **{name: on_its_device(getattr(self, name), chosen) for name in _STATES},
        )

    def join(self, other: "SearchBatch") -> "SearchBatch":
        """The searches of both, these first."""
        return replace(
            self,
            suffixes=self.suffixes.join(other.suffixes),
            sizes=self.sizes + other.sizes,
            **{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in _STATES},
        )


_STATES = [field.name for field in fields(SearchBatch) if field.name not in ("suffixes", "sizes")]
