"""Residual blocks of low rank, which begin as the identity."""

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """z + a low-rank map of z, scaled and shifted by numbers of the layer's own.

    With `relu_last` that is z + relu(s (U V z + b) + t), as in MEND; else
    z + s relu(U V z + b) + t, as in MALMEN. U is zero at first, and relu passes gradients at 0, or
    U would never move.

    Args:
        entries: E, of a row.
        rank: of U (E x rank) and V (rank x E).
        layers: matrices that share the block.
        relu_last: see above.
        generator: draws V.
    """

    def __init__(
        self, entries: int, rank: int, layers: int, *, relu_last: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.relu_last = relu_last
        self.down = nn.Parameter(torch.randn(rank, entries, generator=generator))
        self.up = nn.Parameter(torch.zeros(entries, rank))
        self.bias = nn.Parameter(torch.zeros(entries))
        self.scale = nn.Parameter(torch.ones(layers, entries))
        self.shift = nn.Parameter(torch.zeros(layers, entries))

    def forward(self, rows_RE: Tensor, layer: int) -> Tensor:
        """Rows of the matrix with this number among those that share the block."""
        mapped = rows_RE @ self.down.T @ self.up.T + self.bias
        scale, shift = self.scale[layer], self.shift[layer]
        if self.relu_last:
            return rows_RE + (scale * mapped + shift).clamp(min=0)
        return rows_RE + scale * mapped.clamp(min=0) + shift


class ResidualStack(nn.Module):
    """Blocks one after the other.

    Args:
        entries, rank, layers, relu_last, generator: as of `ResidualBlock`.
        blocks: how many.
    """

    def __init__(
        self,
        entries: int,
        rank: int,
        blocks: int,
        layers: int,
        *,
        relu_last: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(entries, rank, layers, relu_last=relu_last, generator=generator)
            for _ in range(blocks)
        )

    def forward(self, rows_RE: Tensor, layer: int) -> Tensor:
        """Rows of the matrix with this number among those that share the stack."""
        for block in self.blocks:
            rows_RE = block(rows_RE, layer)
        return rows_RE
