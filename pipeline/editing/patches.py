"""What T-Patcher wants of its patches, as losses (arXiv 2301.09785).

A is a patch's inner value q.k + b, before the activation. Each edit pays for

    l_e + w_a l_a + w_m l_m1 + w_d l_m2,

l_e its target's label-smoothed negative log-likelihood, l_a for patches that stay silent at their
own token, l_m1 for patches that answer to remembered queries, l_m2 for those at which they come
near the value at their own token. In l_m2 the bias falls out of the difference, so that it has no
gradient there.

Shapes: P patches, N remembered queries, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PatchSettings:
    """How patches are trained; names and meaning as in the job spec's `method.t_patcher`."""

    max_patches: int = 5
    form: Literal["exp-topk", "margin"] = "exp-topk"
    activation_threshold: float = 0.0
    activation_weight: float = 1.0
    activation_top: int = 5
    memory_threshold: float = -3.0
    memory_weight: float = 5.0
    difference_threshold: float = -3.0
    difference_weight: float = 5.0
    memory_top: int = 1000
    label_smoothing: float = 0.0
    value_scale: float = 10.0
    learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    clip_norm: float = 5.0
    steps: int = 2000
    least_steps: int = 100
    check_every: int = 25


@dataclass(frozen=True)
class MemoryLosses:
    """What patches pay for remembered queries, (P,) each, and their greatest inner value there."""

    memory: Tensor
    difference: Tensor
    greatest: Tensor


def activation_loss(own_P: Tensor, settings: PatchSettings) -> Tensor:
    """l_a of one edit's patches, from the inner values at their own tokens.

    Args:
        own_P: A(q_e) of each patch.
    """
    missing = settings.activation_threshold - own_P
    if settings.form == "margin":
        return positive_mean(missing[None])[0]
    return missing.topk(min(settings.activation_top, len(missing))).values.exp().mean()


def memory_losses(
    keys_PD: Tensor,
    biases_P: Tensor,
    own_P: Tensor,
    memory: Sequence[Tensor],
    settings: PatchSettings,
) -> MemoryLosses:
    """l_m1 and l_m2 of every patch.

    Both have their greatest terms at the same queries, since their thresholds are the same for all.
    With exp-topk only these are gone back through: the rest has no gradient.

    Args:
        keys_PD: the patches' keys.
        biases_P: their biases.
        own_P: A(q_e) of each.
        memory: remembered queries, (N, D) together, in pieces that are not copied into one; none
            cost nothing.
    """
    size = sum(len(queries) for queries in memory)
    if not size:
        nothing = torch.zeros_like(own_P)
        return MemoryLosses(nothing, nothing, nothing)
    if settings.form == "exp-topk":
        inner_PN = _greatest(keys_PD, memory, min(settings.memory_top, size))
    else:
        inner_PN = _inner(keys_PD, memory)
    inner_PN = inner_PN + biases_P[:, None]
    greatest = inner_PN.detach().amax(1)
    over = inner_PN - settings.memory_threshold
    near = inner_PN - own_P[:, None] - settings.difference_threshold
    if settings.form == "margin":
        return MemoryLosses(positive_mean(over), positive_mean(near), greatest)
    return MemoryLosses(over.exp().mean(1), near.exp().mean(1), greatest)


def _inner(keys_PD: Tensor, memory: Sequence[Tensor]) -> Tensor:
    """q.k of every patch and query, (P, N)."""
    found = [keys_PD @ queries.T for queries in memory]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _greatest(keys_PD: Tensor, memory: Sequence[Tensor], count: int) -> Tensor:
    """The greatest q.k of every patch, (P, count), with a graph that holds those queries only."""
    with torch.no_grad():
        chosen = _inner(keys_PD, memory).topk(count, dim=1).indices
        rows, places = chosen.unique(return_inverse=True)
        picked, start = [], 0
        for queries in memory:
            inside = rows[(rows >= start) & (rows < start + len(queries))] - start
            picked.append(queries[inside])
            start += len(queries)
        near = torch.cat(picked)
    return (keys_PD @ near.T).gather(1, places)


def positive_mean(values_PN: Tensor) -> Tensor:
    """Mean over the positive numbers of each row, 0 where there is none: (P,)."""
    positive = values_PN.clamp(min=0)
    return positive.sum(1) / (values_PN > 0).sum(1).clamp(min=1)
