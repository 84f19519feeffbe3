"""The value search one edit at a time, plainly: what the batched search is measured against.

Every step runs the whole model over all of an edit's padded prompts and projects every position
onto the vocabulary, as the code published with MEMIT does (arXiv 2210.07229).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.editing.batching import make_batch
from pipeline.editing.values import ValueSettings
from pipeline.models.editable import EditableModel
from pipeline.planning.flops import ModelSize
from pipeline.prompts import EditPrompts


def plain_value(
    model: EditableModel, edit: EditPrompts, layer: int, settings: ValueSettings
) -> tuple[Tensor, int]:
    """Search one value with the whole model in every step: z (d,), and the gradient steps taken."""
    prompts = (*edit.rewrites, edit.essence)
    rows = plain_rows(edit)
    batch = make_batch(model, rows, range(len(rows)))
    lookups = [row.lookup for row in prompts]
    clean: list[Tensor] = []
    delta = torch.zeros(model.hidden_size, device=model.input_device, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    handle = model.blocks[layer].register_forward_hook(_adder(delta, lookups, clean))
    reference: Tensor | None = None
    for step in range(settings.steps):
        logits = model.model(input_ids=batch.ids, attention_mask=batch.real.long()).logits
        log_p = logits.log_softmax(dim=-1)
        essence = log_p[-1, lookups[-1]]
        reference = essence.detach() if reference is None else reference
        kl = (essence.exp() * (essence - reference)).sum()
        decay = settings.weight_decay * delta.norm() / clean[0].norm() ** 2
        nll = _nll(log_p, edit, [len(row) for row in rows[:-1]])
        loss = nll + settings.kl_weight * kl + decay
        if loss.item() < settings.stop_loss or step == settings.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            limit = settings.clamp_norm * clean[0].norm()
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    handle.remove()
    return (clean[0] + delta).detach().cpu(), step


def plain_rows(edit: EditPrompts) -> list[tuple[int, ...]]:
    """The rows that the plain search runs: every context with the target, and the essence row."""
    return [*((*row.ids, *edit.target[:-1]) for row in edit.rewrites), edit.essence.ids]


def plain_value_flops(size: ModelSize, edit: EditPrompts, steps: int, layer: int) -> float:
    """FLOP that the plain search executes, padding included.

    A pass is 2 (all blocks + d v) a token forward; a gradient step adds 2 (blocks above L + d v)
    backward.
    """
    rows = plain_rows(edit)
    tokens = len(rows) * max(len(row) for row in rows)
    forward = sum(size.blocks) + size.unembedding
    backward = size.above(layer) + size.unembedding
    return 2.0 * tokens * ((steps + 1) * forward + steps * backward)


def _adder(delta: Tensor, lookups: Sequence[int], clean: list[Tensor]) -> Callable[..., Any]:
    """A forward hook that adds delta at the lookup tokens and keeps the first clean state."""

    def add(_module: object, _inputs: object, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not clean:
            clean.append(hidden[0, lookups[0]].detach().clone())
        changed = hidden.clone()
        for index, lookup in enumerate(lookups):
            changed[index, lookup] += delta
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return add


def _nll(log_p: Tensor, edit: EditPrompts, lengths: Sequence[int]) -> Tensor:
    target = torch.tensor(edit.target, device=log_p.device)
    rows = [
        log_p[index, length - len(target) : length].gather(-1, target[:, None]).mean()
        for index, length in enumerate(lengths)
    ]
    return -torch.stack(rows).mean()
