"""The training of MEND (arXiv 2110.11309, section 3.2)."""

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.editing.hypernetworks.network import HyperNetwork
from pipeline.methods.hyper_training import HyperTrainable


class MendTraining(HyperTrainable):
    """Each matrix's rate has a learning rate of its own."""

    published: Mapping[str, Any] = {
        "batch_size": 2,
        "accumulate": 10,
        "learning_rate": 1e-6,
        "warm_up": 0,
        "edit_weight": 0.1,
        "locality_weight": 1.0,
        "max_gradient_norm": 100.0,
        "own_prompt_share": 0.0,
        "draw_targets": "none",
    }

    def optimiser(self, network: HyperNetwork) -> torch.optim.Optimizer:
        assert self.train.learning_rate is not None
        named = dict(network.named_parameters())
        rates = [parameter for name, parameter in named.items() if name.startswith("rates.")]
        others = [parameter for name, parameter in named.items() if not name.startswith("rates.")]
        return torch.optim.Adam(
            [
                {"params": others, "lr": self.train.learning_rate},
                {"params": rates, "lr": self.spec.method.mend.edit_rate_learning_rate},
            ]
        )
