"""Similarity of edits and queries, and the loss that teaches it (SERAC, arXiv 2206.06520).

A query x is in the scope of an edit e with probability s(e, x) = exp(-scale ||u(e) - u(x)||^2).
Distances are kept and not probabilities: -log s is the distance itself, and
-log(1 - s) = -log(-expm1(-d)) keeps its digits where s is near 1.

Shapes: N pairs, E size of an embedding.
"""

import torch
from torch import Tensor


def distances(edits_NE: Tensor, queries_NE: Tensor, scale: float) -> Tensor:
    """scale ||u(e) - u(x)||^2 of pairs, (N,); equal embeddings have exactly 0."""
    return scale * (edits_NE - queries_NE).square().sum(dim=-1)


def all_distances(edits_ME: Tensor, queries_NE: Tensor, scale: float) -> Tensor:
    """The same of every edit with every query, (M, N)."""
    return distances(edits_ME[:, None], queries_NE[None], scale)


def similarity(distance: Tensor) -> Tensor:
    """s, the probability that a query is in scope."""
    return torch.exp(-distance)


def log_out_of_scope(distance: Tensor) -> Tensor:
    """log(1 - s); the smallest distance that counts is the dtype's spacing at 1.

    At distance 0 the logarithm has neither a value nor a gradient.
    """
    return torch.log(-torch.expm1(-distance.clamp_min(torch.finfo(distance.dtype).eps)))


def balanced_loss(in_scope: Tensor, out_of_scope: Tensor) -> Tensor:
    """Mean of -log s over the pairs in scope plus mean of -log(1 - s) over the others; a scalar.

    Args:
        in_scope: (N,) distances of edits and queries of theirs.
        out_of_scope: (M,) distances of edits and queries that are none of theirs.
    """
    return in_scope.mean() - log_out_of_scope(out_of_scope).mean()


def hardest(distance_NM: Tensor, count: int) -> Tensor:
    """The distances of every edit's nearest queries of other edits, (N * count,).

    Args:
        distance_NM: distances of N edits with the queries of M edits, the first N of which are
            their own: the diagonal is left out.
        count: queries an edit; all there are where there are fewer.
    """
    own = torch.eye(*distance_NM.shape, dtype=torch.bool, device=distance_NM.device)
    others = distance_NM.masked_fill(own, torch.inf)
    count = min(count, distance_NM.shape[1] - 1)
    return others.topk(count, dim=1, largest=False).values.flatten()
