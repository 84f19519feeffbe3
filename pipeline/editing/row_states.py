"""The rows of a batch of edits, run once before the value search.

Rows behind one context template begin with the same tokens in every edit. Those are their stem: it
runs once for the whole batch, and every row goes on from its attention keys and values.

Shapes: T tokens that are kept: of all stems, and of all rows behind their stems.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.batching import TokenBatch, make_batch, token_batches
from pipeline.models.caches import PrefixCache, RecordingCache
from pipeline.models.editable import EditableModel
from pipeline.models.halfway import attention_states, recorded_halfway
from pipeline.models.masks import plain_segments

_TOKENS_AT_ONCE = 2048

AttentionStates = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RowPlan:
    """One row of one edit: its tokens (target included but for the last), and where it is cut."""

    ids: tuple[int, ...]
    lookup: int


class RowStates:
    """What blocks 0..L make of all rows, and the attention keys and values of their prefixes above.

    Args:
        model: the model.
        plans: the rows of every edit; those in one place belong to one context template.
        layer: the block L.
        halved: keep the middle of block L too.

    Attributes:
        places: for every edit, row and token where in T it is kept.
        hidden: (T, d) output of block L; zeros for stems.
        prefix: layer above L -> keys and values, (T, heads, head size) each; zeros where a token is
            not before a lookup token.
        entered, attended: (rows, d) input of block L and output of its attention at every row's
            lookup token, rows in the plans' order; empty unless `halved`.
    """

    def __init__(
        self,
        model: EditableModel,
        plans: Sequence[Sequence[RowPlan]],
        layer: int,
        *,
        halved: bool = False,
    ) -> None:
        self._model, self._layer = model, layer
        stems = [_stem(rows) for rows in zip(*plans, strict=True)]
        device = model.input_device
        self._stem_lengths = torch.tensor([len(stem) for stem in stems], device=device)
        stem_places, start = [], 0
        for stem in stems:
            stem_places.append(range(start, start + len(stem)))
            start += len(stem)
        self.places: list[list[list[int]]] = []
        rests: list[tuple[int, ...]] = []
        self._numbers: list[int] = []
        self._lookups: list[int] = []
        starts: list[int] = []
        for plan in plans:
            self.places.append([])
            for number, row in enumerate(plan):
                rest = row.ids[len(stems[number]) :]
                self.places[-1].append([*stem_places[number], *range(start, start + len(rest))])
                starts.append(start)
                rests.append(rest)
                self._numbers.append(number)
                self._lookups.append(row.lookup - len(stems[number]))
                start += len(rest)
        self._starts = torch.tensor(starts, device=device)
        self.hidden = torch.zeros(
            start, model.hidden_size, dtype=model.dtype, device=model.device_of(layer)
        )
        self.prefix: AttentionStates = {}
        self._halved = halved
        self.entered = self.hidden.new_zeros(len(rests) if halved else 0, model.hidden_size)
        self.attended = torch.zeros_like(self.entered)
        self._run_stems(stems, [place for places in stem_places for place in places])
        most = max(_TOKENS_AT_ONCE, *map(len, rests))
        for batch in token_batches(model, rests, most):
            self._run_rows(batch)

    def _run_stems(self, stems: Sequence[tuple[int, ...]], places: list[int]) -> None:
        """Run the stems through all blocks and keep what the rows behind them attend to."""
        # A template without a stem runs one token that nothing reads, so that no tensor is empty.
        batch = make_batch(self._model, [stem or (0,) for stem in stems], range(len(stems)))
        below, above = RecordingCache(), RecordingCache()
        context = {"masks": batch.masks, "position_ids": batch.positions}
        hidden = self._model.run(
            None, first=0, stop=self._layer + 1, input_ids=batch.ids, cache=below, **context
        )
        self._finish(hidden, above, **context)
        self._stem_states = below.recorded | above.recorded
        width = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        self._keep(
            above, torch.tensor(places, dtype=torch.long), width < self._stem_lengths[:, None]
        )

    def _run_rows(self, batch: TokenBatch) -> None:
        """Run rows of like length behind their stems, and their prefixes on to the last block."""
        rows = batch.index.tolist()
        number, lookups = (
            torch.tensor([numbers[row] for row in rows], device=batch.ids.device)
            for numbers in (self._numbers, self._lookups)
        )
        stem_lengths = self._stem_lengths[number]
        longest = int(stem_lengths.max())
        stems: AttentionStates = {}
        for index, (keys, values) in self._stem_states.items():
            own = number.to(keys.device)
            stems[index] = keys[own, :, :longest], values[own, :, :longest]
        positions = batch.positions + stem_lengths[:, None]
        stem_positions = torch.arange(longest, device=positions.device).expand(len(rows), -1)

        def masks(lengths: Tensor, width: int) -> Any:
            segments = [plain_segments(stem_lengths, longest), plain_segments(lengths, width)]
            return self._model.masks(
                torch.cat([stem_positions, positions[:, :width]], dim=1),
                torch.cat(segments, dim=1),
                query_start=longest,
            )

        with recorded_halfway(self._model, self._layer) as half:
            hidden = self._model.run(
                None,
                first=0,
                stop=self._layer + 1,
                masks=masks(batch.lengths, batch.ids.shape[1]),
                position_ids=positions,
                input_ids=batch.ids,
                cache=PrefixCache(stems),
            )
        if self._halved:
            at = torch.arange(len(rows), device=hidden.device), lookups.to(hidden.device)
            self.entered[batch.index] = half.hidden[at]
            self.attended[batch.index] = attention_states(half)[at]
        place = self._starts[batch.index.to(self._starts.device)][:, None] + batch.positions
        self.hidden[place[batch.real].to(hidden.device)] = hidden[batch.real.to(hidden.device)]
        # Where no row has a prefix of its own, one token runs that nothing reads.
        width = max(1, int(lookups.max()))
        cache = RecordingCache(stems)
        self._finish(
            hidden[:, :width],
            cache,
            masks=masks(lookups, width),
            position_ids=positions[:, :width],
        )
        is_prefix = torch.arange(width, device=lookups.device) < lookups[:, None]
        self._keep(cache, place[:, :width][is_prefix], is_prefix)

    def _finish(self, hidden: Tensor, cache: RecordingCache, **context: Any) -> None:
        """Run from block L on for the sake of the cache alone."""
        # What comes out is not read, so one token of the last MLP is enough.
        read = torch.zeros(1, dtype=torch.long, device=hidden.device)
        self._model.final(hidden, first=self._layer + 1, cache=cache, read=read, **context)

    def _keep(self, cache: RecordingCache, places: Tensor, chosen: Tensor) -> None:
        """Put the chosen (rows, tokens) of recorded keys and values into their places."""
        for index, recorded in cache.recorded.items():
            if index not in self.prefix:
                keys, values = (
                    states.new_zeros(len(self.hidden), states.shape[1], states.shape[-1])
                    for states in recorded
                )
                self.prefix[index] = (keys, values)
            for kept, states in zip(self.prefix[index], recorded, strict=True):
                here = states.transpose(1, 2)[chosen.to(states.device)]
                kept[places.to(kept.device)] = here


def _stem(rows: Sequence[RowPlan]) -> tuple[int, ...]:
    """The tokens that all these rows begin with, none of them a lookup token."""
    longest = min(row.lookup for row in rows)
    columns = zip(*(row.ids[:longest] for row in rows), strict=True)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
