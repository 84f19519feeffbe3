"""Prompts that another model answers: which ones, behind what, and how much it counts.

An editor with an edit memory leaves the edited model as it is and sends some prompts to a second
model (SERAC, arXiv 2206.06520). Whoever asks an `EditableModel` something that depends on the
prompt's text looks at its `router` first.

Shapes: N prompts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor

from pipeline.errors import InputError
from pipeline.models.caches import GrowingCache
from pipeline.models.masks import plain_segments

if TYPE_CHECKING:
    from pipeline.models.editable import EditableModel


@dataclass(frozen=True)
class Routes:
    """Where the answers to N prompts come from.

    Attributes:
        model: the second model, of the same vocabulary.
        shares: (N,) float32 on the CPU: how much of an answer's probability is the second model's;
            0 leaves the first one's answer alone, 1 has nothing of it.
        prefixes: for each prompt the ids that the second model reads before it.
        begin: id of a token that begins a text, which a prompt behind a prefix loses; None if there
            is none.
    """

    model: "EditableModel"
    shares: Tensor
    prefixes: list[list[int]]
    begin: int | None = None

    @property
    def taken(self) -> list[int]:
        """The prompts, by number, in whose answer the second model has a share."""
        return self.shares.nonzero().flatten().tolist()

    def row(self, number: int, ids: Sequence[int]) -> list[int]:
        """What the second model reads of a prompt that is given as ids."""
        prefix = self.prefixes[number]
        begins = bool(prefix) and bool(ids) and ids[0] == self.begin == prefix[0]
        return [*prefix, *(ids[1:] if begins else ids)]

    def require_room(self, length: int) -> None:
        """Check that the second model has positions for so many tokens.

        Raises:
            InputError: it has not.
        """
        limit = self.model.max_positions
        if limit is not None and length > limit:
            raise InputError(
                f"a prompt behind the edit that holds it needs {length} tokens with its answer, the"
                f" counterfactual model has {limit} positions; shorten the prompt or leave it out"
            )


class Router(Protocol):
    """Sends prompts to another model."""

    def routes(self, prompts: Sequence[str]) -> Routes:
        """Decide for every prompt."""
        ...


def mixed(first_NV: Tensor, second_NV: Tensor, shares_N: Tensor) -> Tensor:
    """Logits of the joint answer: log((1 - share) p_first + share p_second), (N, V).

    Where a share is 1 these are the second model's logits, untouched.
    """
    weight = shares_N.to(first_NV)[:, None]
    both = torch.logaddexp(
        torch.log1p(-weight) + first_NV.log_softmax(-1), weight.log() + second_NV.log_softmax(-1)
    )
    return torch.where(weight == 1, second_NV.to(both.dtype), both)


class RoutedLogits(LogitsProcessor):
    """Lets the second model have its share of every generated token.

    The first model generates as it always does; rows without a share keep its scores, to the bit.

    Args:
        routes: of N prompts, which are the rows of the batch that is generated from. Where a row
            is multiplied for beams or samples, its copies stand side by side, as transformers puts
            them.
        rows: the prompts' ids, without padding.
        width: columns of the batch before the first token that is generated, padding included; of
            an encoder-decoder model the decoder's.
    """

    def __init__(self, routes: Routes, rows: Sequence[Sequence[int]], width: int) -> None:
        self._routes, self._width = routes, width
        self._rows = {number: routes.row(number, rows[number]) for number in routes.taken}
        self._num_prompts = len(rows)
        self._cache = GrowingCache()
        self._seen: Tensor | None = None
        self._real: Tensor | None = None
        self._encoded: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, (rows, V); arguments as transformers gives them."""
        if not self._rows:
            return scores
        copies = len(input_ids) // self._num_prompts
        numbers = [number for number in self._rows for _ in range(copies)]
        lines = [number * copies + copy for number in self._rows for copy in range(copies)]
        index = torch.tensor(lines, device=scores.device)
        second = self._next(numbers, input_ids[index, self._width :])
        shares = self._routes.shares[numbers].to(scores.device)
        # Beams add up logarithms of probabilities; a sampled token does not mind the difference.
        joint = mixed(scores[index], second.to(scores.device), shares).log_softmax(-1)
        return scores.index_copy(0, index, joint.to(scores.dtype))

    def _next(self, numbers: Sequence[int], new: Tensor) -> Tensor:
        """The second model's logits behind its prompts and the tokens generated so far."""
        if self._routes.model.has_encoder:
            return self._answered(numbers, new)
        goes_on = self._seen is not None and torch.equal(new[:, :-1], self._seen)
        self._seen = new
        if not goes_on:
            # The first token, or beams that have changed places.
            self._cache = GrowingCache()
            ids, self._real = self._padded(numbers, new)
            return self._run(ids, self._real)
        assert self._real is not None
        last = new[:, -1:].to(self._real.device)
        self._real = torch.cat([self._real, torch.ones_like(last, dtype=torch.bool)], dim=1)
        return self._run(last, self._real)

    @torch.inference_mode()
    def _answered(self, numbers: Sequence[int], new: Tensor) -> Tensor:
        """The same of a second model whose encoder reads the prompts, which it does once."""
        model, count = self._routes.model, len(new)
        start, new = model.answers.start, new.to(model.input_device)
        assert start is not None, "a decoder's answers have one"
        ids = torch.cat([new.new_full((count, 1), start), new], dim=1)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        sources = [self._rows[number] for number in numbers]
        lengths = torch.full((count,), ids.shape[1], device=ids.device)
        segments = plain_segments(lengths, ids.shape[1])
        masks = model.masks(positions, segments, sources=sources)
        masks = model.ready(replace(masks, states=self._encoded))
        self._encoded = masks.states
        states = model.final(None, first=0, masks=masks, position_ids=positions, input_ids=ids)
        return model.logits(states[:, -1])

    def _padded(self, numbers: Sequence[int], new: Tensor) -> tuple[Tensor, Tensor]:
        """Whole rows, padded on the left, and where they are real."""
        rows = [[*self._rows[n], *ids] for n, ids in zip(numbers, new.tolist(), strict=True)]
        longest = max(len(row) for row in rows)
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        real = torch.arange(longest) >= longest - lengths[:, None]
        device = self._routes.model.input_device
        return ids.to(device), real.to(device)

    @torch.inference_mode()
    def _run(self, ids: Tensor, real: Tensor) -> Tensor:
        """Logits behind the last token, (rows, V).

        Args:
            ids: (rows, tokens) of those tokens that are not in the cache.
            real: (rows, all tokens) bool, False at padding.
        """
        self._routes.require_room(int(real.sum(dim=1).max()))
        model, start = self._routes.model, real.shape[1] - ids.shape[1]
        positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
        segments = torch.where(real, 0, -1)[..., None].expand(*real.shape, 2)
        states = model.final(
            None,
            first=0,
            masks=model.masks(positions, segments, start),
            position_ids=positions[:, start:],
            input_ids=ids,
            cache=self._cache,
        )
        return model.logits(states[:, -1])
