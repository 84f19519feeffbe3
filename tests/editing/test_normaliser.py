"""Running moments against those of everything at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.editing.normaliser import Moments
from pipeline.editing.solve import ridge_factors
from tests.cases import draw, relative_error


@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 10_000))
def test_moments_after_batches_are_those_of_all_rows(cuts: list[int], seed: int) -> None:
    rows = 3.0 * draw(sum(cuts), 4, seed=seed) + 5.0
    moments = Moments.none(4)
    for part in rows.split(cuts):
        moments = moments.with_rows(part)
    assert moments.count == len(rows)
    assert torch.allclose(moments.mean, rows.mean(0), rtol=1e-12)
    assert torch.allclose(
        moments.squares, (rows - rows.mean(0)).square().sum(0), rtol=1e-9, atol=1e-12
    )


def test_the_published_variance_is_too_much_by_the_unbiased_factor() -> None:
    rows = draw(2, 3)
    right, published = (Moments.none(3).with_rows(rows, biased=biased) for biased in (True, False))
    assert torch.allclose(published.squares, 2.0 * right.squares)
    with pytest.raises(ValueError, match="one target token alone"):
        Moments.none(3).with_rows(rows[:1], biased=False)


def test_an_entry_that_never_varies_is_nothing() -> None:
    rows = draw(5, 3)
    rows[:, 1] = 2.0
    normal = Moments.none(3).with_rows(rows).normalise(rows)
    assert not normal[:, 1].any()
    assert torch.allclose(normal[:, [0, 2]].std(0, correction=0), torch.ones(2).double(), rtol=1e-5)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    ridge=st.sampled_from([0.01, 1.0, 100.0]),
    seed=st.integers(0, 10_000),
)
def test_ridge_regression_in_either_form(
    shape: tuple[int, int, int], ridge: float, seed: int
) -> None:
    rows, size, hidden = shape
    keys, values = draw(rows, size, seed=seed), draw(rows, hidden, seed=seed + 1)
    left, right = ridge_factors(keys, values, ridge)
    assert left.shape[1] == min(rows, size)
    plain = values.T @ keys @ torch.linalg.inv(keys.T @ keys + ridge * torch.eye(size).double())
    assert relative_error(left @ right, plain) < 1e-9
