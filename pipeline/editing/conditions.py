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
        conditions = tuple(condition_of(self.model, edit) for edit in self.edits)
        return replace(super().factors(tokens), conditions=conditions)


@torch.no_grad()
def condition_of(model: EditableModel, edit: EditPrompts) -> Condition:
    """An edit with the model's own answer, as many tokens as the new one has."""
    prompt = edit.rewrites[0].ids
    old = greedy(model, prompt, len(edit.target))
    return Condition(*(_embedded(model, ids) for ids in (old, edit.target, prompt)))


@torch.no_grad()
def greedy(model: EditableModel, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The likeliest next token, `count` times; an encoder-decoder model's go on past its end."""
    start = model.answers.start
    ids, sources = (list(prompt), None) if start is None else ([start], [prompt])
    begun = len(ids)
    for _ in range(count):
        batch = make_batch(model, [ids], [0], sources)
        states = model.final(
            None,
            first=0,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
            read=batch.last,
        )
        ids.append(int(model.logits(states)[0].argmax()))
    return tuple(ids[begun:])


def _embedded(model: EditableModel, ids: Sequence[int]) -> Tensor:
    table = model.model.get_input_embeddings()
    found: Tensor = table(torch.tensor(ids, device=model.input_device))
    return found.to(torch.promote_types(found.dtype, torch.float32)).cpu()
