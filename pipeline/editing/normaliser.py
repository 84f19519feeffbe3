"""The lifelong normaliser of UltraEdit (arXiv 2505.14679): running moments of features.

Moments are merged as by Chan et al. ("Updating formulae and a pairwise algorithm for computing
sample variances", 1979), in float64.

Shapes: R rows, E entries of a row.
"""

from dataclasses import dataclass

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

    def with_rows(self, rows_RE: Tensor, *, biased: bool = True) -> "Moments":
        """Moments that count these rows too.

        Args:
            rows_RE: at least one row.
            biased: what is added is R times the mean squared deviation. Else R times the unbiased
                estimate, as in the published code, which is too much by R / (R - 1).

        Raises:
            ValueError: one row alone has no unbiased variance.
        """
        rows = rows_RE.double()
        added = len(rows)
        if not biased and added < 2:
            raise ValueError("one target token alone has no unbiased variance; edit more at once")
        mean = rows.mean(dim=0)
        squares = (rows - mean).square().sum(dim=0) * (1.0 if biased else added / (added - 1))
        count, apart = self.count + added, mean - self.mean
        return Moments(
            count,
            self.mean + apart * (added / count),
            self.squares + squares + apart.square() * (self.count * added / count),
        )

    def normalise(self, rows_RE: Tensor) -> Tensor:
        """Rows less the mean, in standard deviations, (R, E) float64.

        An entry that never varied gives 0.
        """
        deviation = (self.squares / self.count).sqrt()
        apart = rows_RE.double() - self.mean
        normal = apart / (deviation + _EPSILON)
        return torch.where(deviation > 0, normal, torch.zeros_like(normal))
