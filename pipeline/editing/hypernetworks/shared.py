"""The residual stacks that matrices of one shape share."""

import torch
from torch import Tensor, nn

from pipeline.editing.hypernetworks.blocks import ResidualStack
from pipeline.editing.hypernetworks.rows import Normalisers, Sizes, shape_name


class SharedStacks(nn.Module):
    """A stack a shape, with its normaliser; every matrix has scales and shifts of its own in it.

    Args:
        sizes: of the edited matrices.
        rank, blocks, relu_last: as of `ResidualStack`.
        normalises: whether rows are normalised first.
        seed: draws the parameters.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        rank: int,
        blocks: int,
        relu_last: bool,
        normalises: bool,
        seed: int,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.normalisers = Normalisers(sizes, normalises=normalises)
        self._alike: dict[str, list[int]] = {}
        for layer, size in sizes.items():
            self._alike.setdefault(shape_name(size), []).append(layer)
        self.of_shape = nn.ModuleDict(
            {
                name: ResidualStack(
                    sum(sizes[layers[0]]),
                    rank,
                    blocks,
                    len(layers),
                    relu_last=relu_last,
                    generator=generator,
                )
                for name, layers in self._alike.items()
            }
        )

    def forward(self, keys_RF: Tensor, gradients_RD: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's rows as its stack maps them: (R, F) and (R, D), in the parameters' type."""
        name = shape_name(self.normalisers.sizes[layer])
        stack = self.of_shape[name]
        rows = self.normalisers.normalised(keys_RF, gradients_RD, layer)
        mapped = stack(rows.to(stack.blocks[0].down), self._alike[name].index(layer))  # type: ignore[index,union-attr]
        keys, gradients = mapped.split([keys_RF.shape[1], gradients_RD.shape[1]], dim=1)
        return keys, gradients
