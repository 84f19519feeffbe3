"""Edits in words, as token embeddings, for an editor that reads them beside their gradients."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.editing.batching import make_batch
from pipeline.editing.gradients import Condition, Factors, TargetGradients, Tokens
from pipeline.models.editable import EditableModel
from pipeline.prompts import EditPrompts


class ConditionedGradients(TargetGradients):
    """Factors of edits with their conditions; the prompt is that behind the first context."""

    def factors(self, tokens: Tokens) -> Factors:
        return replace(super().factors(tokens), conditions=conditions_of(self.model, self.edits))

    def factors_apart(self, tokens: Tokens, size: int) -> list[Factors]:
        conditions = conditions_of(self.model, self.edits)
        return [
            replace(found, conditions=conditions[number * size : (number + 1) * size])
            for number, found in enumerate(super().factors_apart(tokens, size))
        ]


def conditions_of(model: EditableModel, edits: Sequence[EditPrompts]) -> tuple[Condition, ...]:
    """Edits with the model's own answers, each as many tokens as the new one has."""
    prompts = [edit.rewrites[0].ids for edit in edits]
    answers = greedy(model, prompts, [len(edit.target) for edit in edits])
    return tuple(
        Condition(*(_embedded(model, ids) for ids in (old, edit.target, prompt)))
        for old, edit, prompt in zip(answers, edits, prompts, strict=True)
    )


@torch.no_grad()
def greedy(
    model: EditableModel, prompts: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[tuple[int, ...]]:
    """The likeliest next token of each prompt, as many times as `counts` says for it.

    An encoder-decoder model's go on past its end token.
    """
    start = model.answers.start
    rows = [list(prompt) if start is None else [start] for prompt in prompts]
    sources = None if start is None else prompts
    begun = [len(row) for row in rows]
    for made in range(max(counts)):
        left = [number for number, count in enumerate(counts) if count > made]
        batch = make_batch(model, rows, left, sources)
        states = model.final(
            None,
            first=0,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
            read=batch.last,
        )
        for number, token in zip(left, model.logits(states).argmax(-1).tolist(), strict=True):
            rows[number].append(token)
    return [tuple(row[first:]) for row, first in zip(rows, begun, strict=True)]


@torch.no_grad()
def _embedded(model: EditableModel, ids: Sequence[int]) -> Tensor:
    table = model.model.get_input_embeddings()
    found: Tensor = table(torch.tensor(ids, device=model.input_device))
    return found.to(torch.promote_types(found.dtype, torch.float32)).cpu()
