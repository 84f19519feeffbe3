"""MEND, MALMEN and KE written plainly: token by token, explicit inverses, autograd through all.

Methods: Mitchell et al., "Fast Model Editing at Scale" (arXiv 2110.11309); Tan et al., "Massive
Editing for Large Language Models via Meta Learning" (arXiv 2311.04661); De Cao et al., "Editing
Factual Knowledge in Language Models" (arXiv 2104.08164).

Legend: d hidden size, f input size of the down-projection, x input and g output gradient of one.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from tests.oracles.gradients import oriented

Parameters = Mapping[str, Tensor]


def normal(row: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """A row less the mean, in standard deviations; 0 where there is no deviation."""
    epsilon = torch.finfo(torch.float32).eps
    return torch.stack(
        [
            (value - m) / (s + epsilon) if s > 0 else torch.zeros_like(value)
            for value, m, s in zip(row, mean, deviation, strict=True)
        ]
    )


def blocks(row: Tensor, of: Parameters, layer: int, *, count: int, is_mend: bool) -> Tensor:
    """A row through the residual blocks; `of` holds N.up, N.down, N.bias, N.scale, N.shift."""
    for number in range(count):
        up, down, bias, scale, shift = (
            of[f"{number}.{name}"] for name in ("up", "down", "bias", "scale", "shift")
        )
        mapped = up @ (down @ row) + bias
        if is_mend:
            row = row + torch.clamp(scale[layer] * mapped + shift[layer], min=0)
        else:
            row = row + scale[layer] * torch.clamp(mapped, min=0) + shift[layer]
    return row


def mend_update(
    pairs: Sequence[tuple[Tensor, Tensor]],
    of: Parameters,
    rate: Tensor,
    moments: tuple[Tensor, Tensor] | None,
    layer: int,
    count: int,
) -> Tensor:
    """The update (d, f) of a layer from its tokens' (x, g); without moments nothing is scaled."""
    total = torch.zeros(len(pairs[0][1]), len(pairs[0][0])).double()
    for x, g in pairs:
        if not (x.any() and g.any()):
            continue
        row = torch.cat([x, g])
        row = row if moments is None else normal(row, *moments)
        row = blocks(row, of, layer, count=count, is_mend=True)
        total = total - rate * torch.outer(row[len(x) :], row[: len(x)])
    return total


def malmen_update(
    pairs: Sequence[tuple[Tensor, Tensor]],
    of: Parameters,
    rate: Tensor,
    log_ridge: Tensor,
    moments: tuple[Tensor, Tensor],
    layer: int,
    count: int,
) -> Tensor:
    """The update (d, f) of a layer, (K^T K + e^lambda I)^-1 K^T V turned round, rows tokens."""
    values = []
    for x, g in pairs:
        row = blocks(normal(torch.cat([x, g]), *moments), of, layer, count=count, is_mend=False)
        values.append(-rate * (x @ row[: len(x)]) * row[len(x) :])
    keys, wanted = torch.stack([x for x, _ in pairs]), torch.stack(values)
    gram = keys.T @ keys + torch.exp(log_ridge) * torch.eye(keys.shape[1]).double()
    return (torch.linalg.inv(gram) @ keys.T @ wanted).T


def edited_loss(
    model: PreTrainedModel,
    weight_names: Mapping[int, str],
    downs: Mapping[int, nn.Module],
    updates: Mapping[int, Tensor],
    asked: Sequence[tuple[list[int], list[int]]],
    left: Sequence[tuple[list[int], range]],
    *,
    edit_weight: float,
    locality_weight: float,
    smoothing: float = 0.0,
) -> Tensor:
    """The training loss of a batch with its graph through the updates, a mean over the examples.

    Args:
        model: unedited.
        weight_names: layer -> name of the edited parameter.
        downs: layer -> the down-projection.
        updates: layer -> (d, f).
        asked: (prompt, answer) token ids.
        left: token ids, and the places whose next token is to stay.
    """
    own = dict(model.named_parameters())
    edited = {
        name: own[name] + oriented(downs[layer], updates[layer])
        for layer, name in weight_names.items()
    }

    def logits(ids: list[int], weights: Parameters) -> Tensor:
        found = functional_call(model, dict(weights), (torch.tensor([ids]),))
        return found.logits[0].double().log_softmax(-1)

    losses = []
    for prompt, answer in asked:
        predicted = logits(prompt + answer[:-1], edited)[len(prompt) - 1 :]
        of_tokens = [
            -(1 - smoothing) * predicted[i, token] - smoothing * predicted[i].mean()
            for i, token in enumerate(answer)
        ]
        losses.append(edit_weight * torch.stack(of_tokens).mean())
    for ids, places in left:
        before, after = logits(ids, {}).detach(), logits(ids, edited)
        apart = [(before[p].exp() * (before[p] - after[p])).sum() for p in places]
        losses.append(locality_weight * torch.stack(apart).mean())
    return torch.stack(losses).sum() / len(asked)
