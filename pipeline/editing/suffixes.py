"""Everything about a batch of edits that the value search computes once.

Rows of one edit (its contexts, and the essence row) are cut at the lookup token. What comes before
is the prefix, kept as attention keys and values above block L; the lookup token and what follows is
the suffix, kept as the output of block L. Both are laid out so that one batch row is one edit.

Shapes: B edits, R rows of all edits, S and P suffix and prefix tokens an edit, d hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.batching import TokenBatch, make_batch, token_batches
from pipeline.models.caches import RecordingCache
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class SuffixBatch:
    """The constant part of the value search of B edits.

    Attributes:
        hidden: (B, S, d) clean output of block L, float32 (float64 for a float64 model).
        anchor: (B, d) h0: the output of block L at the bare prompt's lookup token.
        is_lookup: (B, S), 1 at every row's lookup token, else 0; dtype of `hidden`.
        positions: (B, S) int64 position ids.
        masks: attention masks for the suffix behind the prefix.
        prefix: layer -> keys and values, (B, heads, P, head size) each.
        is_read: (B, S) bool, True where the loss reads the model's output.
        target_index: (B, contexts, target tokens) int64, where in S each target token is predicted
            (at padding, where the last one is).
        target_ids: (B, contexts, target tokens) int64, 0 at padding.
        target_weight: (B, contexts, target tokens), 1 / (contexts * the edit's target tokens), 0 at
            padding.
        essence_index: (B,) int64, the essence row's lookup token in S.
        num_tokens: suffix tokens that are not padding.
    """

    hidden: Tensor
    anchor: Tensor
    is_lookup: Tensor
    positions: Tensor
    masks: Any
    prefix: dict[int, tuple[Tensor, Tensor]]
    is_read: Tensor
    target_index: Tensor
    target_ids: Tensor
    target_weight: Tensor
    essence_index: Tensor
    num_tokens: int

    def reads(self) -> "Reads":
        """Find the states that the loss reads among all tokens; waits for the device."""
        flat = self.is_read.flatten()
        place = flat.cumsum(0) - 1
        first = torch.arange(len(self.anchor), device=flat.device) * self.is_read.shape[1]
        return Reads(
            flat.nonzero().squeeze(-1),
            place[first[:, None, None] + self.target_index],
            place[first + self.essence_index],
        )

    def select(self, keep: Tensor) -> "SuffixBatch":
        """The same for some of the edits; `keep` (int64) indexes B."""
        chosen = {
            field.name: _select(getattr(self, field.name), keep)
            for field in fields(self)
            if field.name != "num_tokens"
        }
        return replace(self, **chosen)


@dataclass(frozen=True)
class Reads:
    """Where the loss reads the model's output.

    Attributes:
        tokens: (n,) int64 indices into B * S, ascending.
        targets: (B, contexts, target tokens) int64 indices into `tokens`.
        essence: (B,) int64 indices into `tokens`.
    """

    tokens: Tensor
    targets: Tensor
    essence: Tensor


def _select(value: Any, keep: Tensor) -> Any:
    if isinstance(value, dict):
        return {key: _select(part, keep) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_select(part, keep) for part in value)
    return value[keep]


@dataclass(frozen=True)
class _RowPlan:
    """One row of one edit: its tokens (target included but for the last), and where it is cut."""

    ids: tuple[int, ...]
    lookup: int


def encode_suffixes(model: EditableModel, edits: Sequence[EditPrompts], layer: int) -> SuffixBatch:
    """Run what does not change during the search: blocks 0..L, and the prefixes above L."""
    plans = [_rows_of(edit) for edit in edits]
    states = _States(model, [row for plan in plans for row in plan], layer)
    layout = _Layout(plans, model.device)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    packed = states.hidden[layout.suffix_source].to(wide)
    target_index, target_ids, target_weight = _targets(edits, plans, model.device, wide)
    essence_index = layout.row_starts[:, -1]
    is_read = torch.zeros(packed.shape[:2], dtype=torch.bool, device=model.device)
    is_read.scatter_(1, torch.cat([target_index.flatten(1), essence_index[:, None]], dim=1), True)
    return SuffixBatch(
        hidden=packed,
        anchor=packed[:, 0].clone(),
        is_lookup=layout.is_lookup.to(wide),
        positions=layout.suffix_positions,
        masks=model.masks(layout.positions, layout.segments, query_start=layout.prefix_width),
        prefix={
            index: (_by_head(keys, layout.prefix_source), _by_head(values, layout.prefix_source))
            for index, (keys, values) in states.prefix.items()
        },
        is_read=is_read,
        target_index=target_index,
        target_ids=target_ids,
        target_weight=target_weight,
        essence_index=essence_index,
        num_tokens=layout.num_tokens,
    )


def _rows_of(edit: EditPrompts) -> list[_RowPlan]:
    """The contexts' rows, the bare prompt first; last the essence row, which ends at its lookup."""
    rows = [_RowPlan((*row.ids, *edit.target[:-1]), row.lookup) for row in edit.rewrites]
    essence = edit.essence
    return [*rows, _RowPlan(essence.ids[: essence.lookup + 1], essence.lookup)]


class _States:
    """What blocks 0..L make of all rows, and the attention keys and values of their prefixes above.

    Rows of like length run together; the results lie one row's tokens behind the other's.

    Attributes:
        hidden: (T, d) output of block L, T tokens of all rows.
        prefix: layer -> keys and values, (T, heads, head size) each; only the entries of tokens
            before a lookup token mean something.
    """

    def __init__(self, model: EditableModel, rows: Sequence[_RowPlan], layer: int) -> None:
        self.model, self.layer = model, layer
        starts = [0, *accumulate(len(row.ids) for row in rows)]
        self.starts = torch.tensor(starts[:-1], device=model.device)
        self.num_tokens = starts[-1]
        self.hidden = torch.empty(0)
        self.prefix: dict[int, tuple[Tensor, Tensor]] = {}
        widest = max(len(row.ids) for row in rows)
        most = max(_TOKENS_AT_ONCE, widest)
        for batch in token_batches(model, [row.ids for row in rows], most):
            self._run(batch, [rows[i].lookup for i in batch.index.tolist()])

    def _run(self, batch: TokenBatch, lookups: Sequence[int]) -> None:
        hidden = self.model.run(
            None,
            first=0,
            stop=self.layer + 1,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
        )
        place = self.starts[batch.index.to(self.starts.device)][:, None] + batch.positions
        if not self.hidden.numel():
            self.hidden = hidden.new_empty(self.num_tokens, hidden.shape[-1])
        self.hidden[place[batch.real]] = hidden[batch.real]
        self._record(hidden, place, lookups)

    def _record(self, hidden: Tensor, place: Tensor, lookups: Sequence[int]) -> None:
        """Keep the keys and values of what precedes the lookup tokens."""
        cache = RecordingCache()
        # A row without a prefix records one token that nothing reads, so that no tensor is empty.
        batch = make_batch(
            self.model, [(0,) * max(1, lookup) for lookup in lookups], range(len(lookups))
        )
        self.model.final(
            hidden[:, : batch.ids.shape[1]],
            first=self.layer + 1,
            masks=batch.masks,
            position_ids=batch.positions,
            cache=cache,
            # Nobody reads what comes out, so one token of the last MLP is enough.
            read=place.new_zeros(1),
        )
        place = place[:, : batch.ids.shape[1]][batch.real]
        for index, recorded in cache.recorded.items():
            if index not in self.prefix:
                shape = (self.num_tokens, recorded[0].shape[1])
                self.prefix[index] = tuple(r.new_zeros(*shape, r.shape[-1]) for r in recorded)  # type: ignore[assignment]
            for kept, new in zip(self.prefix[index], recorded, strict=True):
                kept[place] = new.transpose(1, 2)[batch.real]


def _by_head(states: Tensor, source: Tensor) -> Tensor:
    """(T, heads, size) picked by token index (B, P): (B, heads, P, size)."""
    return states[source].transpose(1, 2).contiguous()


class _Layout:
    """Where each token of each row of each edit stands in the packed batch."""

    def __init__(self, plans: Sequence[Sequence[_RowPlan]], device: torch.device) -> None:
        suffix, prefix, starts = [], [], []
        start = 0
        for plan in plans:
            suffix_tokens: list[tuple[int, int, int]] = []
            prefix_tokens: list[tuple[int, int, int]] = []
            row_starts: list[int] = []
            for number, row in enumerate(plan):
                row_starts.append(len(suffix_tokens))
                tokens = [(start + i, i, number) for i in range(len(row.ids))]
                prefix_tokens += tokens[: row.lookup]
                suffix_tokens += tokens[row.lookup :]
                start += len(tokens)
            suffix.append(suffix_tokens)
            prefix.append(prefix_tokens)
            starts.append(row_starts)
        suffix_table, prefix_table = _table(suffix, device), _table(prefix, device)
        self.num_tokens = sum(len(tokens) for tokens in suffix)
        self.prefix_width = prefix_table.shape[1]
        self.row_starts = torch.tensor(starts, device=device)
        self.suffix_source = suffix_table[..., 0].clamp(min=0)
        self.prefix_source = prefix_table[..., 0].clamp(min=0)
        self.suffix_positions = suffix_table[..., 1].clamp(min=0)
        whole = torch.cat([prefix_table, suffix_table], dim=1)
        self.positions = whole[..., 1].clamp(min=0)
        self.segments = whole[..., 2:].expand(-1, -1, 2)
        self.is_lookup = torch.zeros(self.suffix_source.shape, device=device)
        self.is_lookup.scatter_(1, self.row_starts, 1.0)


def _table(rows: list[list[tuple[int, int, int]]], device: torch.device) -> Tensor:
    """(B, longest, 3) int64 of (source, position, segment); -1 at padding."""
    width = max(len(row) for row in rows)
    padding = (-1, -1, -1)
    padded = [row + [padding] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=device).view(len(rows), width, 3)


def _targets(
    edits: Sequence[EditPrompts],
    plans: Sequence[Sequence[_RowPlan]],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where target tokens are predicted, which they are, and their weight in the loss."""
    contexts = len(edits[0].rewrites)
    longest = max(len(edit.target) for edit in edits)
    index = torch.zeros(len(edits), contexts, longest, dtype=torch.long)
    ids = torch.zeros_like(index)
    weight = torch.zeros(index.shape, dtype=dtype)
    for b, (edit, plan) in enumerate(zip(edits, plans, strict=True)):
        count = len(edit.target)
        start = 0
        for c, row in enumerate(plan[:-1]):
            size = len(row.ids) - row.lookup
            index[b, c] = start + size - 1
            index[b, c, :count] = torch.arange(start + size - count, start + size)
            ids[b, c, :count] = torch.tensor(edit.target)
            start += size
        weight[b, :, :count] = 1.0 / (contexts * count)
    return index.to(device), ids.to(device), weight.to(device)
