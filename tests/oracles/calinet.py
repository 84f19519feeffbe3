"""CaliNET's loss for some facts, written out with full forward passes; autograd gives gradients."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def loss(
    model: nn.Module,
    networks: Mapping[int, tuple[nn.Module, nn.Module]],
    banks: Mapping[int, Mapping[str, Tensor]],
    activation: Callable[[Tensor], Tensor],
    prompts: list[list[int]],
    target: list[int],
    neutral: list[int],
    kl_weight: float,
) -> Tensor:
    """Mean over an edit's prompts of the target tokens' mean NLL, and the KL at a neutral text.

    Args:
        model: the model.
        networks: layer -> up- and down-projection.
        banks: layer -> keys, values and perhaps gates.
        activation: of the slots.
        prompts: token ids, one prompt a context.
        target: token ids.
        neutral: token ids of a text at all of whose tokens the KL is taken.
        kl_weight: its weight.
    """
    before = model(input_ids=torch.tensor([neutral])).logits[0].log_softmax(-1).detach()
    handles: list[Any] = []
    for layer, (up, down) in networks.items():
        seen: list[Tensor] = []
        bank = banks[layer]

        def enter(_m: nn.Module, inputs: Any, seen: list[Tensor] = seen) -> None:
            seen.append(inputs[0])

        def leave(
            _m: nn.Module,
            _i: Any,
            output: Tensor,
            seen: list[Tensor] = seen,
            bank: Mapping[str, Tensor] = bank,
        ) -> Tensor:
            for slot, key in enumerate(bank["keys"]):
                inner = seen[-1] @ key
                if "gates" in bank:
                    inner = activation(seen[-1] @ bank["gates"][slot]) * inner
                else:
                    inner = activation(inner)
                output = output + inner[..., None] * bank["values"][slot]
            return output

        handles += [up.register_forward_pre_hook(enter), down.register_forward_hook(leave)]
    total = torch.zeros((), dtype=torch.float64)
    for prompt in prompts:
        ids = [*prompt, *target[:-1]]
        likely = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        losses = [-likely[len(prompt) - 1 + i, token] for i, token in enumerate(target)]
        total = total + torch.stack(losses).mean() / len(prompts)
    after = model(input_ids=torch.tensor([neutral])).logits[0].log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(1).mean()
    for handle in handles:
        handle.remove()
    return total + kl_weight * divergence
