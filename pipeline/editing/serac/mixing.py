"""How the edited model's answer and the counterfactual model's become one (arXiv 2206.06520).

hard: h answers where s > threshold, the edited model elsewhere, each untouched.
soft: p = (1 - s) p_base + s p_h. (The published code adds a small constant inside the logarithm;
log-sum-exp needs none, and the probabilities add up to 1.)
"""

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["hard", "soft"]


def consulted(similarity: Tensor, mode: Mode, threshold: float) -> Tensor:
    """Which queries h is asked at all; (N,) bool.

    Args:
        similarity: (N,) s of each query with its nearest edit.
        threshold: of the hard mode.
    """
    return similarity > threshold if mode == "hard" else similarity > 0


def mixed(base_NV: Tensor, counterfactual_NV: Tensor, similarity: Tensor) -> Tensor:
    """Logarithm of the mixed probabilities, (N, V), of the soft mode.

    Args:
        base_NV: the edited model's logits.
        counterfactual_NV: h's.
        similarity: (N,) s; 0 and 1 give one model's probabilities.
    """
    weight = similarity.to(base_NV.dtype)[:, None]
    return torch.logaddexp(
        torch.log1p(-weight) + base_NV.log_softmax(-1),
        weight.log() + counterfactual_NV.log_softmax(-1),
    )
