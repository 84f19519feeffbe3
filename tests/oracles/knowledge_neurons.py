"""Knowledge neurons written plainly: one step, one prompt, one block, one whole pass at a time.

Method: Dai et al., "Knowledge Neurons in Pretrained Transformers" (arXiv 2104.08696).

Legend: f input size of the down-projection.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.oracles.memit import _logits, hooked, module_input

Measured = Callable[[Tensor, int], Tensor]


def probability(logits: Tensor, token: int) -> Tensor:
    """Of a token, from the logits at its position."""
    return logits.softmax(-1)[token]


def logit(logits: Tensor, token: int) -> Tensor:
    """Of a token."""
    return logits[token]


def measured_with(
    model: PreTrainedModel,
    down: nn.Module,
    ids: Sequence[int],
    place: int,
    token: int,
    neurons: Tensor,
    measured: Measured = probability,
) -> Tensor:
    """What is measured of a token when a block's neurons at the place that predicts it are these.

    Args:
        ids: the prompt, and the answer as far as it goes before the token.
        neurons: (f,).
    """

    def put(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])
        rows = [neurons if i == place else flat[i] for i in range(len(flat))]
        return (torch.stack(rows).view_as(inputs[0]),)

    with hooked(down.register_forward_pre_hook(put)):
        return measured(_logits(model, list(ids))[place], token)


def attribute(
    model: PreTrainedModel,
    downs: Sequence[nn.Module],
    prompt: Sequence[int],
    answer: Sequence[int],
    alphas: Sequence[float],
    measured: Measured = probability,
) -> Tensor:
    """Attributions of all neurons, (blocks, f): the mean over the answer's tokens."""
    found = []
    for down in downs:
        of_tokens = []
        for number, token in enumerate(answer):
            ids = [*prompt, *answer[:number]]
            place = len(ids) - 1
            given = module_input(model, down, ids).reshape(len(ids), -1)[place].detach()
            total = torch.zeros_like(given)
            for alpha in alphas:
                scaled = (alpha * given).requires_grad_()
                with torch.enable_grad():
                    result = measured_with(model, down, ids, place, token, scaled, measured)
                    total += torch.autograd.grad(result, scaled)[0]
            of_tokens.append(given * total / len(alphas))
        found.append(torch.stack(of_tokens).mean(0))
    return torch.stack(found)


def agreed(
    prompts: Sequence[Tensor], threshold: float, share: float, fewest: int, most: int
) -> list[tuple[int, int]]:
    """The (block, neuron) pairs of a fact whose share of its prompts agrees, share adapted.

    Where no share gives between `fewest` and `most`, the nearest side of what was tried counts.
    """
    sets = []
    for scores in prompts:
        most_of_all = float(scores.max())
        sets.append(
            {
                (block, neuron)
                for block in range(scores.shape[0])
                for neuron in range(scores.shape[1])
                if most_of_all > 0 and float(scores[block, neuron]) > threshold * most_of_all
            }
        )

    def of(percent: int) -> list[tuple[int, int]]:
        union = sorted(set().union(*sets))
        return [n for n in union if 100 * sum(n in s for s in sets) >= percent * len(sets)]

    percent = round(100 * share)
    found = of(percent)
    while len(found) < fewest and percent > 5:
        percent -= 5
        if found and len(of(percent)) > most:
            return found
        found = of(percent)
    while len(found) > most and percent < 100 and of(percent + 5):
        percent += 5
        found = of(percent)
    return found


def exchanged(
    values: Tensor,
    embeddings: Tensor,
    old: Sequence[int],
    new: Sequence[int],
    weights: tuple[float, float],
) -> Tensor:
    """What is added to each value (n, d) when the old answer makes place for the new one."""
    rows = []
    for value in values:
        take, give = (embeddings[list(ids)].mean(0) for ids in (old, new))
        rows.append(
            -weights[0] * value.norm() / take.norm() * take
            + weights[1] * value.norm() / give.norm() * give
        )
    return torch.stack(rows)
