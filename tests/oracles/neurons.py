"""Added neurons, one position and one neuron at a time."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def bank_output(
    query_D: Tensor, parts: Mapping[str, Tensor], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """sum_p a_p v_p, with a_p = act(q.k_p + b_p), or act(q.g_p) (q.k_p + b_p) with gates."""
    total = torch.zeros_like(query_D)
    for p in range(len(parts["biases"])):
        inner = torch.dot(query_D, parts["keys"][p].to(query_D)) + parts["biases"][p].to(query_D)
        if "gates" in parts:
            strength = activation(torch.dot(query_D, parts["gates"][p].to(query_D))) * inner
        else:
            strength = activation(inner)
        total += strength * parts["values"][p].to(query_D)
    return total
