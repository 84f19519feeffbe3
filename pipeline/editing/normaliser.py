"""Running moments of features: UltraEdit's lifelong normaliser (arXiv 2505.14679), and that of
MEND (2110.11309) and MALMEN (2311.04661).

Moments are merged as by Chan et al. ("Updating formulae and a pairwise algorithm for computing
sample variances", 1979), in float64.

Shapes: R rows, E entries of a row.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Moments:
    """Moments of all rows so far.

    Attributes:
        count: rows.
        mean: (E,) float64.
        squares: (E,) float64, sum of squared deviations from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def none(cls, entries: int) -> "Moments":
        """Of no row yet."""
        return cls(0, torch.zeros(entries).double(), torch.zeros(entries).double())

    @classmethod
    def of(cls, rows_RE: Tensor) -> "Moments":
        """Of these rows, at least one."""
        rows = rows_RE.double()
        mean = rows.mean(dim=0)
        return cls(len(rows), mean, (rows - mean).square().sum(dim=0))

    def to(self, device: torch.device | str) -> "Moments":
        """The same on a device."""
        return Moments(self.count, self.mean.to(device), self.squares.to(device))

    def merged(self, other: "Moments") -> "Moments":
        """Moments of both's rows."""
        count, apart = self.count + other.count, other.mean - self.mean
        if count == 0:
            return self
        return Moments(
            count,
            self.mean + apart * (other.count / count),
            self.squares + other.squares + apart.square() * (self.count * other.count / count),
        )

    def with_rows(self, rows_RE: Tensor, *, biased: bool = True) -> "Moments":
        """Moments that count these rows too.

        Args:
            rows_RE: at least one row.
            biased: what is added is R times the mean squared deviation. Else R times the unbiased
                estimate, as in the published code, which is too much by R / (R - 1).

        Raises:
            ValueError: one row alone has no unbiased variance.
        """
        added = Moments.of(rows_RE)
        if not biased and added.count < 2:
            raise ValueError("one target token alone has no unbiased variance; edit more at once")
        if not biased:
            added = replace(added, squares=added.squares * (added.count / (added.count - 1)))
        return self.merged(added)

    def normalise(self, rows_RE: Tensor) -> Tensor:
        """Rows less the mean, in standard deviations, (R, E) float64.

        An entry that never varied gives 0.
        """
        deviation = (self.squares / self.count).sqrt()
        apart = rows_RE.double() - self.mean
        normal = apart / (deviation + _EPSILON)
        return torch.where(deviation > 0, normal, torch.zeros_like(normal))
