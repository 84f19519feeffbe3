"""Rows [k; g] of keys and output gradients: which count, and how they are normalised."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.editing.gradients import Factors
from pipeline.editing.normaliser import Moments

Sizes = Mapping[int, tuple[int, int]]
"""Layer -> (D, F) of its weight."""


def shape_name(size: tuple[int, int]) -> str:
    """The name under which matrices of a shape share a network."""
    return f"{size[0]}x{size[1]}"


def counting_rows(factors: Factors, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's keys (R, F) and gradients (R, D) of the rows in which neither is zero.

    Padding, and tokens that no target depends on, have none; normalised they would not stay zero.
    """
    keys, gradients = factors.keys[layer], factors.gradients[layer]
    counts = (keys != 0).any(dim=1) & (gradients != 0).any(dim=1)
    return keys[counts], gradients[counts]


class RunningNormaliser(nn.Module):
    """Moments of all rows that training has seen, as buffers; they stay as they are afterwards.

    Args:
        entries: E, of a row.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(entries, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(entries, dtype=torch.float64))

    @property
    def moments(self) -> Moments:
        """What the buffers hold."""
        return Moments(int(self.count), self.mean, self.squares)

    @torch.no_grad()
    def take(self, seen: Moments) -> None:
        """Count more rows."""
        merged = self.moments.merged(seen)
        self.count.fill_(merged.count)
        self.mean.copy_(merged.mean)
        self.squares.copy_(merged.squares)

    def forward(self, rows_RE: Tensor) -> Tensor:
        """Rows less the mean, in standard deviations, (R, E) float64."""
        return self.moments.normalise(rows_RE)


class Normalisers(nn.Module):
    """One running normaliser a shape of matrix.

    Args:
        sizes: of the edited matrices.
        normalises: whether rows are normalised at all.
    """

    def __init__(self, sizes: Sizes, *, normalises: bool = True) -> None:
        super().__init__()
        self.sizes, self.normalises = dict(sizes), normalises
        shapes = dict.fromkeys(self.sizes.values())
        self.of_shape = nn.ModuleDict({shape_name(s): RunningNormaliser(sum(s)) for s in shapes})

    def seen_in(self, factors: Factors) -> dict[str, Moments]:
        """Moments of the rows that count, of each shape that has some."""
        rows: dict[str, list[Tensor]] = {}
        for layer, size in self.sizes.items():
            both = torch.cat(counting_rows(factors, layer), dim=1)
            rows.setdefault(shape_name(size), []).append(both)
        joined = {name: torch.cat(parts) for name, parts in rows.items()}
        return {name: Moments.of(found) for name, found in joined.items() if len(found)}

    def take(self, seen: Mapping[str, Moments]) -> None:
        """Count these rows too."""
        for name, moments in seen.items():
            self.of_shape[name].take(moments)  # type: ignore[operator]

    def normalised(self, keys_RF: Tensor, gradients_RD: Tensor, layer: int) -> Tensor:
        """A layer's rows [k; g] as its shape's normaliser has them, (R, E) float64."""
        rows = torch.cat([keys_RF, gradients_RD], dim=1)
        if not self.normalises:
            return rows.double()
        normal: Tensor = self.of_shape[shape_name(self.sizes[layer])](rows)
        return normal
