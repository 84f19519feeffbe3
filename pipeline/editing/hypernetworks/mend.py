"""MEND (arXiv 2110.11309): the factors of a gradient, each token's mapped by a trained network.

The factors x, d of a token are mapped together to x~, d~; the update is - rate sum of d~ x~^T over
all tokens of all edits. The published code adds it with a plus sign, so that training has to turn
it round first.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.editing.gradients import Factors
from pipeline.editing.hypernetworks.network import HyperNetwork, Seen
from pipeline.editing.hypernetworks.rows import Sizes, counting_rows
from pipeline.editing.hypernetworks.shared import SharedStacks
from pipeline.editing.update import Update


class MendNetwork(HyperNetwork):
    """The editor of some matrices.

    Args:
        sizes: of the edited matrices.
        rank: of a residual layer.
        hidden_layers: residual layers before the last one.
        edit_rate: what each matrix's rate begins at.
        normalises: whether factors are normalised first.
        seed: draws the parameters.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        rank: int,
        hidden_layers: int,
        edit_rate: float,
        seed: int,
        normalises: bool = True,
    ) -> None:
        super().__init__()
        self.stacks = SharedStacks(
            sizes,
            rank=rank,
            blocks=hidden_layers + 1,
            relu_last=True,
            normalises=normalises,
            seed=seed,
        )
        self.rates = nn.ParameterDict(
            {str(layer): nn.Parameter(torch.tensor(edit_rate)) for layer in sizes}
        )

    @torch.no_grad()
    def edit(self, factors: Factors) -> dict[int, Update]:
        return {layer: Update.of(*self._sides(factors, layer)) for layer in self._layers}

    def updates(self, factors: Factors) -> dict[int, Tensor]:
        """Layer -> (D, F), differentiable."""
        return {layer: torch.mm(*self._sides(factors, layer)) for layer in self._layers}

    def gradients(self, factors: Factors, slopes: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return gradients_through(self, self.updates(factors), slopes)

    def seen_in(self, factors: Factors) -> Seen:
        return self.stacks.normalisers.seen_in(factors)

    def take(self, seen: Seen) -> None:
        self.stacks.normalisers.take(seen)

    @property
    def _layers(self) -> list[int]:
        return list(self.stacks.normalisers.sizes)

    def _sides(self, factors: Factors, layer: int) -> tuple[Tensor, Tensor]:
        """(D, R) and (R, F), whose product is the update."""
        keys, gradients = self.stacks(*counting_rows(factors, layer), layer)
        return -self.rates[str(layer)] * gradients.T, keys


def gradients_through(
    network: nn.Module, updates: Mapping[int, Tensor], slopes: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """Gradients in a network's parameters of sum over the layers of <slope, update>."""
    total = torch.stack(
        [(slopes[layer].to(update) * update).sum() for layer, update in updates.items()]
    ).sum()
    named = dict(network.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    pairs = zip(named, found, strict=True)
    return {name: gradient.cpu() for name, gradient in pairs if gradient is not None}
