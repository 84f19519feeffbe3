"""Intervals at 95 %, over edits: the probes of one edit share their fact and are not independent.

Wilson's score interval (Wilson 1927) where every edit's mean is 0 or 1, as it is with one probe an
edit; else the percentiles of a bootstrap (Efron 1979) that draws edits with all their probes. Its
draws come from a constant seed.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
_SEED = 20220210
_DRAWS_AT_ONCE = 2_000_000

Floats = NDArray[np.float64]


def interval(values: Sequence[float] | Floats) -> tuple[float, float]:
    """95 % interval of the mean of `values`, one number in [0, 1] an edit; see the module's text.

    Raises:
        ValueError: there is no value.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values to give an interval for")
    return bounds(array, bootstrap_means(array[:, None])[:, 0])


def bootstrap_means(values: Floats) -> Floats:
    """Means over edits drawn with replacement: (edits, columns) to (RESAMPLES, columns).

    Not a number marks an edit without a value in a column; means are over the edits that have one.
    """
    count = len(values)
    known = ~np.isnan(values)
    filled, present = np.where(known, values, 0.0), known.astype(np.float64)
    generator = np.random.default_rng(_SEED)
    at_once = max(1, _DRAWS_AT_ONCE // count)
    means = []
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn = generator.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        weights = times.astype(np.float64)
        with np.errstate(invalid="ignore"):  # a draw without any value gives 0 / 0
            means.append((weights @ filled) / (weights @ present))
    return np.concatenate(means)


def bounds(values: Floats, resampled: Floats) -> tuple[float, float]:
    """The interval of the mean of some values, which it holds whatever is rounded."""
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        low, high = _wilson(mean, values.size)
    else:
        low, high = percentiles(resampled)
    return min(low, mean), max(high, mean)


def _wilson(mean: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    squared = _Z95**2 / count
    centre = (mean + squared / 2.0) / (1.0 + squared)
    half = _Z95 / (1.0 + squared) * math.sqrt(mean * (1.0 - mean) / count + squared / 4.0 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def percentiles(means: Floats) -> tuple[float, float]:
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return float(low), float(high)
