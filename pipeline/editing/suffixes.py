"""Everything about a batch of edits that the value search computes once.

Rows of one edit (its contexts, and the essence row) are cut at the lookup token. What comes before
is the prefix, kept as attention keys and values above block L; the lookup token and what follows is
the suffix, kept as the output of block L. Both are laid out so that one batch row is one edit.

Shapes: B edits, R rows of all edits, S and P suffix and prefix tokens an edit, d hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.halves import Halves
from pipeline.editing.row_states import RowPlan, RowStates
from pipeline.models.editable import EditableModel
from pipeline.models.masks import lowest
from pipeline.prompts import EditPrompts


@dataclass(frozen=True)
class SuffixBatch:
    """The constant part of the value search of B edits.

    It is where block L is; a layer's prefix is where the layer is, and what the loss is read by
    (`is_read`, `target_*`, `essence_index`) where the model puts out its logits.

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
        token_counts: (B,) int64, suffix tokens that are not padding.
        halves: the middle of block L at the lookup tokens, where the search is inside the block.
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
    token_counts: Tensor
    halves: Halves | None = None

    def reads(self) -> "Reads":
        """Find the states that the loss reads among all tokens; waits for the device."""
        flat = self.is_read.flatten()
        place = flat.cumsum(0) - 1
        first = torch.arange(len(self.is_read), device=flat.device) * self.is_read.shape[1]
        return Reads(
            flat.nonzero().squeeze(-1),
            place[first[:, None, None] + self.target_index],
            place[first + self.essence_index],
        )

    @property
    def width(self) -> int:
        """Suffix tokens an edit, padding counted."""
        return self.hidden.shape[1]

    def join(self, other: "SuffixBatch") -> "SuffixBatch":
        """The edits of both, these first, padded to the wider of each dimension."""
        both = (self, other)
        suffix = max(batch.width for batch in both)
        prefix = max(_width(batch.masks) - batch.width for batch in both)
        targets = max(batch.target_ids.shape[-1] for batch in both)

        def joined(name: str, *sizes: int) -> Tensor:
            return torch.cat([_padded(getattr(batch, name), sizes) for batch in both])

        return SuffixBatch(
            hidden=joined("hidden", suffix, self.hidden.shape[2]),
            anchor=joined("anchor"),
            is_lookup=joined("is_lookup", suffix),
            positions=joined("positions", suffix),
            masks=_join_masks([batch.masks for batch in both], suffix, prefix),
            prefix={
                layer: (
                    _stacked(keys, other.prefix[layer][0], prefix),
                    _stacked(values, other.prefix[layer][1], prefix),
                )
                for layer, (keys, values) in self.prefix.items()
            },
            is_read=joined("is_read", suffix),
            target_index=torch.cat([_repeated(batch.target_index, targets) for batch in both]),
            target_ids=joined("target_ids", targets),
            target_weight=joined("target_weight", targets),
            essence_index=joined("essence_index"),
            token_counts=joined("token_counts"),
            halves=None if self.halves is None else self.halves.join(_present(other.halves)),
        )

    def select(self, keep: Tensor) -> "SuffixBatch":
        """The same for some of the edits; `keep` (int64) indexes B."""
        return SuffixBatch(
            **{field.name: _select(getattr(self, field.name), keep) for field in fields(self)}
        )


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


def _present(halves: Halves | None) -> Halves:
    assert halves is not None, "all batches of a search are of one kind"
    return halves


def _select(value: Any, keep: Tensor) -> Any:
    if value is None:
        return None
    if isinstance(value, Halves):
        return value.select(keep)
    if isinstance(value, dict):
        return {key: _select(part, keep) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_select(part, keep) for part in value)
    return on_its_device(value, keep)


def on_its_device(value: Tensor, keep: Tensor) -> Tensor:
    """Some of a tensor's rows, where it is."""
    return value[keep.to(value.device)]


def _padded(states: Tensor, sizes: Sequence[int]) -> Tensor:
    """Fill the last dimensions up to these sizes with zeros at their ends."""
    fill: list[int] = []
    for have, wanted in zip(reversed(states.shape), reversed(sizes), strict=False):
        fill += [0, wanted - have]
    return torch.nn.functional.pad(states, fill) if any(fill) else states


def _stacked(first: Tensor, second: Tensor, tokens: int) -> Tensor:
    """Attention states (B, heads, P, head size) of two batches, with P filled up to `tokens`."""
    size = (tokens, first.shape[-1])
    return torch.cat([_padded(first, size), _padded(second, size)])


def _repeated(index: Tensor, width: int) -> Tensor:
    """Fill the last dimension up to `width` with its last entry."""
    missing = width - index.shape[-1]
    return torch.cat([index, index[..., -1:].expand(*index.shape[:-1], missing)], dim=-1)


def _width(masks: Any) -> int:
    """Tokens that the queries of some masks may see: prefix and suffix."""
    mask = next(iter(masks.values())) if isinstance(masks, dict) else masks
    return int(mask.shape[-1])


def _join_masks(masks: Sequence[Any], suffix: int, prefix: int) -> Any:
    """Masks (B, 1, S, P + S) of some batches as one; what is added is seen by nobody."""
    if isinstance(masks[0], dict):
        return {
            kind: _join_masks([mask[kind] for mask in masks], suffix, prefix) for kind in masks[0]
        }
    joined = []
    for mask in masks:
        queries, tokens = mask.shape[2:]
        wide = mask.new_full((len(mask), 1, suffix, prefix + suffix), lowest(mask.dtype))
        own = tokens - queries
        wide[:, :, :queries, :own] = mask[..., :own]
        wide[:, :, :queries, prefix : prefix + queries] = mask[..., own:]
        joined.append(wide)
    return torch.cat(joined)


def encode_suffixes(
    model: EditableModel, edits: Sequence[EditPrompts], layer: int, *, halved: bool = False
) -> SuffixBatch:
    """Run what does not change during the search: blocks 0..L, and the prefixes above L.

    `halved` keeps the middle of block L at the lookup tokens too.
    """
    plans = [_rows_of(edit) for edit in edits]
    states = RowStates(model, plans, layer, halved=halved)
    layout = _Layout(plans, states, model.device_of(layer))
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    packed = states.hidden[layout.suffix_source].to(wide)
    device = model.output_device
    target_index, target_ids, target_weight = _targets(edits, plans, device, wide)
    essence_index = layout.row_starts[:, -1].to(device)
    is_read = torch.zeros(packed.shape[:2], dtype=torch.bool, device=device)
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
        token_counts=layout.token_counts,
        halves=_halves(model, layer, states, layout.row_starts, wide) if halved else None,
    )


def _halves(
    model: EditableModel, layer: int, states: RowStates, place: Tensor, dtype: torch.dtype
) -> Halves:
    entered, attended = (
        kept.view(*place.shape, -1).to(dtype) for kept in (states.entered, states.attended)
    )
    return Halves.of(model, layer, entered, attended, place)


def _rows_of(edit: EditPrompts) -> list[RowPlan]:
    """The contexts' rows, the bare prompt first; last the essence row, which ends at its lookup."""
    rows = [RowPlan((*row.ids, *edit.target[:-1]), row.lookup) for row in edit.rewrites]
    essence = edit.essence
    return [*rows, RowPlan(essence.ids[: essence.lookup + 1], essence.lookup)]


def _by_head(states: Tensor, source: Tensor) -> Tensor:
    """(T, heads, size) picked by token index (B, P): (B, heads, P, size)."""
    return states[source.to(states.device)].transpose(1, 2).contiguous()


class _Layout:
    """Where each token of each row of each edit stands in the packed batch."""

    def __init__(
        self, plans: Sequence[Sequence[RowPlan]], states: RowStates, device: torch.device
    ) -> None:
        suffix, prefix, starts = [], [], []
        for edit, plan in enumerate(plans):
            suffix_tokens: list[tuple[int, int, int]] = []
            prefix_tokens: list[tuple[int, int, int]] = []
            row_starts: list[int] = []
            for number, row in enumerate(plan):
                row_starts.append(len(suffix_tokens))
                places = states.places[edit][number]
                tokens = [(place, i, number) for i, place in enumerate(places)]
                prefix_tokens += tokens[: row.lookup]
                suffix_tokens += tokens[row.lookup :]
            suffix.append(suffix_tokens)
            prefix.append(prefix_tokens)
            starts.append(row_starts)
        suffix_table, prefix_table = _table(suffix, device), _table(prefix, device)
        self.token_counts = torch.tensor([len(tokens) for tokens in suffix], device=device)
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
    plans: Sequence[Sequence[RowPlan]],
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
