"""T-Patcher for one edit, term by term: plain loops and whole forward passes.

Written from the paper's losses (arXiv 2301.09785); nothing here knows `pipeline`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Patched:
    """Keys (P, D), biases (P,), values (P, D) and queries (P, D) of an edit, and steps taken."""

    keys: Tensor
    biases: Tensor
    values: Tensor
    queries: Tensor
    steps: int


def queries_of(model: nn.Module, up: nn.Module, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Inputs of a feed-forward network at every token of one text, and the logits there."""
    seen: list[Tensor] = []
    handle = up.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    handle.remove()
    return seen[0].reshape(len(ids), -1), logits


def exp_topk(numbers: list[Tensor], k: int) -> Tensor:
    """S(v; k): the mean of the exponentials of the k greatest."""
    greatest = sorted(numbers, key=float, reverse=True)[:k]
    return torch.stack([number.exp() for number in greatest]).mean()


def margin(numbers: list[Tensor]) -> Tensor:
    """The mean of the positive ones, 0 without any."""
    positive = [number for number in numbers if number > 0]
    return torch.stack(positive).mean() if positive else torch.tensor(0.0, dtype=torch.float64)


def train(
    model: nn.Module,
    up: nn.Module,
    down: nn.Module,
    activation: Callable[[Tensor], Tensor],
    prompt: list[int],
    target: list[int],
    memory: Tensor,
    drawn: Tensor,
    settings: dict[str, Any],
    steps: int,
) -> Patched:
    """Train one edit's patches for so many steps, without a plateau or an early end."""
    ids = [*prompt, *target[:-1]]
    queries, logits = queries_of(model, up, ids)
    places = range(len(prompt) - 1, len(ids))
    wrong = [p for p, want in zip(places, target, strict=True) if int(logits[p].argmax()) != want]
    own_queries = queries[wrong[: settings["max_patches"]]]
    keys = (own_queries / own_queries.square().sum(1, keepdim=True)).clone().requires_grad_()
    biases = torch.zeros(len(keys), dtype=torch.float64, requires_grad=True)
    scale = torch.full_like(own_queries, settings["value_scale"]).requires_grad_()
    direction = drawn.clone().requires_grad_()
    trained = [keys, biases, scale, direction]
    adam = torch.optim.Adam(
        trained, lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    for _ in range(steps):
        seen: list[Tensor] = []
        enter = up.register_forward_pre_hook(lambda _m, inputs, s=seen: s.append(inputs[0]))

        def add(_m: nn.Module, _i: Any, output: Tensor, seen: list[Tensor] = seen) -> Tensor:
            query = seen[-1]
            for p in range(len(keys)):
                strength = activation(query @ keys[p] + biases[p])
                output = output + strength[..., None] * (scale[p] * direction[p])
            return output

        leave = down.register_forward_hook(add)
        likely = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        enter.remove()
        leave.remove()
        smoothing, losses = settings["label_smoothing"], []
        for place, want in zip(places, target, strict=True):
            all_tokens = -likely[place].mean()
            losses.append((1 - smoothing) * -likely[place, want] + smoothing * all_tokens)
        own = [own_queries[p] @ keys[p] + biases[p] for p in range(len(keys))]
        total = torch.stack(losses).mean()
        silent = [settings["activation_threshold"] - a for a in own]
        is_topk = settings["form"] == "exp-topk"
        of_own = exp_topk(silent, settings["activation_top"]) if is_topk else margin(silent)
        total = total + settings["activation_weight"] * of_own
        for p in range(len(keys)):
            inner = [query @ keys[p] + biases[p] for query in memory]
            over = [a - settings["memory_threshold"] for a in inner]
            near = [a - own[p] - settings["difference_threshold"] for a in inner]
            k = settings["memory_top"]
            m1 = exp_topk(over, k) if is_topk else margin(over)
            m2 = exp_topk(near, k) if is_topk else margin(near)
            weighted = settings["memory_weight"] * m1 + settings["difference_weight"] * m2
            total = total + weighted / len(keys)
        adam.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(trained, settings["clip_norm"])
        adam.step()
    return Patched(keys.detach(), biases.detach(), (scale * direction).detach(), own_queries, steps)
