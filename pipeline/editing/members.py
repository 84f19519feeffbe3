"""Which rows of a search batch look for one value together.

Shapes: G searches, B rows (edits) of all of them, those of one search side by side.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Members:
    """The rows of each search; where every search has one row, nothing is copied or summed.

    Args:
        sizes: rows of each search.
        device: where the batch is.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self._alone = max(sizes) == 1
        if self._alone:
            return
        starts = [0, *accumulate(sizes)][:-1]
        most = max(sizes)
        # Padding repeats the first row with weight 0, so that no search reads another's numbers.
        rows = [
            [start + min(i, size - 1) for i in range(most)]
            for start, size in zip(starts, sizes, strict=True)
        ]
        counts = torch.tensor(sizes, device=device)
        self._starts = torch.tensor(starts, device=device)
        self._rows = torch.tensor(rows, device=device)
        self._real = torch.arange(most, device=device) < counts[:, None]
        self._counts = counts
        self._search = torch.arange(len(sizes), device=device).repeat_interleave(counts)

    def spread(self, states: Tensor) -> Tensor:
        """What a search has, for each of its rows: (G, ...) to (B, ...)."""
        return states if self._alone else states[self._search.to(states.device)]

    def first(self, states: Tensor) -> Tensor:
        """What the first row of each search has: (B, ...) to (G, ...)."""
        return states if self._alone else states[self._starts.to(states.device)]

    def mean(self, numbers: Tensor) -> Tensor:
        """The mean over the rows of each search: (B,) to (G,)."""
        if self._alone:
            return numbers
        rows, real = self._rows.to(numbers.device), self._real.to(numbers.device)
        return (numbers[rows] * real).sum(dim=1) / self._counts.to(numbers.device)

    def every(self, flags: Tensor) -> Tensor:
        """Whether a flag is set for all rows of a search: (B,) bool to (G,)."""
        if self._alone:
            return flags
        rows, real = self._rows.to(flags.device), self._real.to(flags.device)
        return (flags[rows] | ~real).all(dim=1)


def rows_of(sizes: Sequence[int], searches: Sequence[int]) -> list[int]:
    """The rows of some searches, in the order in which these are named."""
    starts = [0, *accumulate(sizes)]
    return [row for search in searches for row in range(starts[search], starts[search + 1])]
