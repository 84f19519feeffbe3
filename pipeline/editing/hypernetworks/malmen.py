"""MALMEN (arXiv 2311.04661): value shifts of every token, put together by a normal equation.

A token with key k and output gradient g, which the network maps to k~ and g~, asks for the shift
v = - eta (k . k~) g~ of its output. The update is the ridge regression of all of them on the keys,
V K^T (K K^T + e^lambda I)^-1, eta and lambda learned for each matrix. Its gradients are written by
hand (section 3.2 there), so that no graph over thousands of edits is kept: with M the gradient of
the loss in the update and P = M (K K^T + e^lambda I)^-1,

    dL/dlambda = - e^lambda <P, update>,    dL/dV = P K,

and the values are computed once more, some rows at a time, for the network's own gradients.
"""

from collections.abc import Mapping
from math import exp

import torch
from torch import Tensor, nn

from pipeline.editing.gradients import Factors
from pipeline.editing.hypernetworks.network import HyperNetwork, Seen
from pipeline.editing.hypernetworks.rows import Sizes, counting_rows
from pipeline.editing.hypernetworks.shared import SharedStacks
from pipeline.editing.solve import RidgeSystem
from pipeline.editing.update import Update

# Rows whose values are computed at once with their graph.
ROWS_AT_ONCE = 1024


class MalmenNetwork(HyperNetwork):
    """The editor of some matrices.

    Args:
        sizes: of the edited matrices.
        rank: of a residual block.
        blocks: residual blocks.
        edit_rate: what each matrix's eta begins at.
        seed: draws the parameters.
    """

    def __init__(
        self, sizes: Sizes, *, rank: int, blocks: int, edit_rate: float, seed: int
    ) -> None:
        super().__init__()
        self.stacks = SharedStacks(
            sizes, rank=rank, blocks=blocks, relu_last=False, normalises=True, seed=seed
        )
        self.rates = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.tensor(edit_rate)) for layer in sizes}
        )
        self.log_ridges = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.zeros(())) for layer in sizes}
        )

    @torch.no_grad()
    def edit(self, factors: Factors) -> dict[int, Update]:
        found = {}
        for layer in self.stacks.normalisers.sizes:
            system, values = self._system(factors, layer)
            found[layer] = Update.of(*system.regression(values))
        return found

    def gradients(self, factors: Factors, slopes: Mapping[int, Tensor]) -> dict[str, Tensor]:
        named = dict(self.named_parameters())
        found: dict[str, Tensor] = {}
        for layer in self.stacks.normalisers.sizes:
            to_ridge, to_values = self._by_hand(factors, slopes[layer].double(), layer)
            found[f"log_ridges.{layer}"] = to_ridge.to(self.log_ridges[str(layer)]).cpu()
            keys, gradients = counting_rows(factors, layer)
            for start in range(0, len(keys), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                values = self.values(keys[rows], gradients[rows], layer)
                total = (to_values[rows].to(values) * values).sum()
                parts = torch.autograd.grad(total, list(named.values()), allow_unused=True)
                for name, part in zip(named, parts, strict=True):
                    if part is not None:
                        found[name] = found[name] + part.cpu() if name in found else part.cpu()
        return found

    def values(self, keys_RF: Tensor, gradients_RD: Tensor, layer: int) -> Tensor:
        """The value shifts of some rows, (R, D), differentiable."""
        mapped_keys, mapped_gradients = self.stacks(keys_RF, gradients_RD, layer)
        alike = (keys_RF.to(mapped_keys) * mapped_keys).sum(dim=1, keepdim=True)
        shifts: Tensor = -self.rates[str(layer)] * alike * mapped_gradients
        return shifts

    def seen_in(self, factors: Factors) -> Seen:
        return self.stacks.normalisers.seen_in(factors)

    def take(self, seen: Seen) -> None:
        self.stacks.normalisers.take(seen)

    @torch.no_grad()
    def _system(self, factors: Factors, layer: int) -> tuple[RidgeSystem, Tensor]:
        """The normal equation of a layer, and its values (R, D) float64."""
        keys, gradients = counting_rows(factors, layer)
        pairs = zip(keys.split(ROWS_AT_ONCE), gradients.split(ROWS_AT_ONCE), strict=True)
        parts = [self.values(*pair, layer) for pair in pairs]
        ridge = exp(float(self.log_ridges[str(layer)]))
        return RidgeSystem(keys.double(), ridge), torch.cat(parts).double()

    @torch.no_grad()
    def _by_hand(self, factors: Factors, slope_DF: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """dL/dlambda (a scalar) and dL/dV (R, D), float64."""
        system, values = self._system(factors, layer)
        divided = system.divided(slope_DF)
        left, right = system.regression(values)
        # <P, left right> without the (D, F) product.
        inner = ((left.T @ divided) * right).sum()
        return -system.ridge * inner, system.keys @ divided.T
