"""Knowledge attribution as it is published: one step of one prompt and block at a time.

Every step is a pass through the whole model and back to the block whose neurons are scaled (arXiv
2104.08696, equation 2), with logits at every position.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from pipeline.editing.attribution import scales
from pipeline.models.editable import EditableModel
from pipeline.prompts import FactPrompts


def plain_scores(
    model: EditableModel, fact: FactPrompts, layers: Sequence[int], steps: int
) -> Tensor:
    """Attributions of a fact's old answer, midpoint rule: (prompts, layers, neurons)."""
    assert fact.old is not None
    return torch.stack(
        [
            torch.stack([_of_block(model, prompt, fact.old, layer, steps) for layer in layers])
            for prompt in fact.prompts
        ]
    )


def _of_block(
    model: EditableModel, prompt: Sequence[int], answer: Sequence[int], layer: int, steps: int
) -> Tensor:
    found = []
    for number, token in enumerate(answer):
        ids = [*prompt, *answer[:number]]
        given = _neurons(model, layer, ids)
        total = torch.zeros_like(given)
        for alpha in scales(steps, "midpoint").tolist():
            scaled = (alpha * given).requires_grad_()
            with torch.enable_grad():
                probability = _logits(model, layer, ids, scaled)[-1].softmax(-1)[token]
                total += torch.autograd.grad(probability, scaled)[0]
        found.append(given * total / steps)
    return torch.stack(found).mean(dim=0)


@torch.no_grad()
def _neurons(model: EditableModel, layer: int, ids: Sequence[int]) -> Tensor:
    """A block's neurons at the last token, (F,)."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2)[-1])

    with ExitStack() as stack:
        stack.callback(model.down_projection(layer).register_forward_pre_hook(keep).remove)
        model.model(input_ids=torch.tensor([list(ids)], device=model.input_device), use_cache=False)
    return seen[0]


def _logits(model: EditableModel, layer: int, ids: Sequence[int], scaled: Tensor) -> Tensor:
    """(T, v), with these neurons at the last token."""

    def put(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        flat = inputs[0].flatten(0, -2)
        return (torch.cat([flat[:-1], scaled[None]]).view_as(inputs[0]),)

    with ExitStack() as stack:
        stack.callback(model.down_projection(layer).register_forward_pre_hook(put).remove)
        given = torch.tensor([list(ids)], device=model.input_device)
        logits: Tensor = model.model(input_ids=given, use_cache=False).logits[0].float()
    return logits
