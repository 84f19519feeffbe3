"""Identities of the least-squares update, for any shape."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.editing.solve import (
    Factor,
    factorise,
    solve_update,
    update_factors,
)
from tests.cases import draw, relative_error
from tests.oracles import memit as oracle

_SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 5))  # N, F, D
_WEIGHTS = st.sampled_from([1e-3, 0.7, 20.0, 1e4])
_SEEDS = st.integers(0, 10_000)


def _problem(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (N, F), residuals (N, D) and a positive definite covariance (F, F)."""
    count, keys, hidden = shape
    samples = draw(3 * keys + 5, keys, seed=seed)
    covariance = samples.T @ samples / len(samples)
    return draw(count, keys, seed=seed + 1), draw(count, hidden, seed=seed + 2), covariance


def _solve(keys: Tensor, residuals: Tensor, covariance: Tensor, weight: float) -> Tensor:
    update, ridge = solve_update(keys.T @ keys, residuals.T @ keys, covariance, weight)
    assert ridge == 0.0
    return update


def _pushed_through(keys: Tensor, residuals: Tensor, factor: Factor) -> Tensor:
    """The update by the push-through identity, whole."""
    left, right = update_factors(keys, residuals, factor)
    return left @ right


@settings(deadline=None)
@given(_SHAPES, _WEIGHTS, _SEEDS)
def test_the_update_is_stationary(shape: tuple[int, int, int], weight: float, seed: int) -> None:
    """The gradient of lambda tr(D C D^T) + ||D K - R||^2 vanishes."""
    keys, residuals, covariance = _problem(shape, seed)
    update = _solve(keys, residuals, covariance, weight).requires_grad_()
    assert update.shape == (shape[2], shape[1]) and update.dtype == torch.float64
    loss = weight * torch.trace(update @ covariance @ update.T)
    loss = loss + (update @ keys.T - residuals.T).square().sum()
    (gradient,) = torch.autograd.grad(loss, update)
    assert gradient.norm() < 1e-9 * (1 + (residuals.T @ keys).norm())


@settings(deadline=None)
@given(_SHAPES, _WEIGHTS, _SEEDS)
def test_the_update_is_the_oracles(shape: tuple[int, int, int], weight: float, seed: int) -> None:
    keys, residuals, covariance = _problem(shape, seed)
    expected = oracle.solve_update(keys.T, residuals.T, covariance, weight)
    assert relative_error(_solve(keys, residuals, covariance, weight), expected) < 1e-8


@settings(deadline=None)
@given(_SHAPES, _WEIGHTS, _SEEDS)
def test_push_through_gives_the_same_update(
    shape: tuple[int, int, int], weight: float, seed: int
) -> None:
    keys, residuals, covariance = _problem(shape, seed)
    kept = keys.clone(), residuals.clone()
    factor = factorise(weight * covariance)
    update = _pushed_through(keys, residuals, factor)
    assert relative_error(update, _solve(keys, residuals, covariance, weight)) < 1e-8
    left, right = update_factors(keys, residuals, factor)
    assert left.shape == (shape[2], shape[0]) and right.shape == (shape[0], shape[1])
    assert relative_error(left @ right, update) < 1e-12
    assert torch.equal(keys, kept[0]) and torch.equal(residuals, kept[1])


@pytest.mark.parametrize("count", [1, 4, 9])
def test_without_protection_the_residuals_are_written_exactly(count: int) -> None:
    """For lambda -> 0 it is the equality-constrained update R (K^T C^-1 K)^-1 K^T C^-1."""
    keys, residuals, covariance = _problem((count, 9, 4), seed=count)
    spread = torch.linalg.solve(covariance, keys.T)
    constrained = residuals.T @ torch.linalg.solve(keys @ spread, spread.T)
    assert relative_error(constrained @ keys.T, residuals.T) < 1e-9
    update = _pushed_through(keys, residuals, factorise(1e-9 * covariance))
    assert relative_error(update, constrained) < 1e-6
    errors = [
        relative_error(_solve(keys, residuals, covariance, weight) @ keys.T, residuals.T)
        for weight in (1e-4, 1e-2, 1.0)
    ]
    assert errors[0] < 1e-2 and errors == sorted(errors)


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3])
def test_a_repeated_key_counts_twice_with_the_mean_residual(weight: float) -> None:
    keys, residuals, covariance = _problem((5, 8, 4), seed=2)
    twice = torch.cat([keys, keys[:1]])
    both = torch.cat([residuals, draw(1, 4, seed=9)])
    scale = torch.tensor([2.0, 1, 1, 1, 1], dtype=torch.float64).sqrt()[:, None]
    merged = residuals.clone()
    merged[0] = (residuals[0] + both[-1]) / 2
    expected = _solve(scale * keys, scale * merged, covariance, weight)
    assert relative_error(_solve(twice, both, covariance, weight), expected) < 1e-10
    pushed = _pushed_through(twice, both, factorise(weight * covariance))
    assert relative_error(pushed, expected) < 1e-10


def test_the_order_of_edits_does_not_matter() -> None:
    keys, residuals, covariance = _problem((6, 8, 4), seed=3)
    flipped = _pushed_through(keys.flip(0), residuals.flip(0), factorise(covariance))
    assert relative_error(flipped, _solve(keys, residuals, covariance, 1.0)) < 1e-12


# --- matrices that are not positive definite ----------------------------------------------------


@settings(deadline=None)
@given(_SHAPES, _SEEDS)
def test_a_good_matrix_gets_no_ridge(shape: tuple[int, int, int], seed: int) -> None:
    covariance = _problem(shape, seed)[2]
    factor = factorise(covariance)
    assert factor.ridge == 0.0
    assert relative_error(factor.lower @ factor.lower.T, covariance) < 1e-12
    assert torch.equal(factor.lower, factor.lower.tril())
    right = draw(len(covariance), 3, seed=seed)
    assert relative_error(covariance @ factor.solve(right), right) < 1e-9


def test_a_singular_matrix_gets_the_smallest_ridge_and_says_so() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64))
    factor = factorise(matrix)
    assert factor.ridge == pytest.approx(1e-10 * 2.0)
    shifted = matrix + factor.ridge * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(factor.lower @ factor.lower.T, shifted, rtol=1e-12, atol=0)
    assert matrix[2, 2] == 0.0  # the matrix itself is left alone
    update, ridge = solve_update(0 * matrix, torch.zeros(2, 3, dtype=torch.float64), matrix, 10.0)
    assert ridge == pytest.approx(10 * factor.ridge)
    assert torch.equal(update, torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("negative", "ridge"), [(1e-11, 1e-10), (1e-9, 1e-8), (1e-7, 1e-6), (1e-5, 1e-4)]
)
def test_the_ridge_grows_until_it_helps(negative: float, ridge: float) -> None:
    entries = torch.ones(1000, dtype=torch.float64)
    entries[7] = -negative
    assert factorise(torch.diag(entries)).ridge == pytest.approx(ridge, rel=0.01)


@pytest.mark.parametrize("negative", [5e-3, 1.0])
def test_a_matrix_that_no_small_ridge_helps_is_refused(negative: float) -> None:
    """The message names a ridge that was tried in vain."""
    entries = torch.ones(1000, dtype=torch.float64)
    entries[7] = -negative
    with pytest.raises(ValueError, match="not positive definite") as caught:
        factorise(torch.diag(entries))
    named = re.search(r"ridge of ([\d.e+-]+)", str(caught.value))
    assert named is not None
    assert float(named[1]) < negative


def test_few_tokens_make_a_singular_covariance_that_still_solves() -> None:
    few = draw(3, 8, seed=1)
    keys, residuals = draw(2, 8, seed=2), draw(2, 4, seed=3)
    factor = factorise(few.T @ few / 3)
    update = _pushed_through(keys, residuals, factor)
    assert torch.isfinite(update).all()
    # Directions that the corpus never used are free: the residuals are written there.
    assert relative_error(update @ keys.T, residuals.T) < 1e-3


_BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf")])


@_BAD
@pytest.mark.parametrize("place", ["gram", "cross", "covariance"])
def test_sums_that_are_not_finite_are_refused(place: str, bad: float) -> None:
    keys, residuals, covariance = _problem((4, 6, 3), seed=5)
    sums = {"gram": keys.T @ keys, "cross": residuals.T @ keys, "covariance": covariance}
    sums[place][1, 2] = bad
    with pytest.raises(ValueError, match="infinities or NaNs"):
        solve_update(sums["gram"], sums["cross"], sums["covariance"], 1.0)


@_BAD
@pytest.mark.parametrize("place", ["keys", "residuals"])
def test_keys_that_are_not_finite_are_refused(place: str, bad: float) -> None:
    keys, residuals, covariance = _problem((4, 6, 3), seed=6)
    (keys if place == "keys" else residuals)[1, 2] = bad
    with pytest.raises(ValueError, match="infinities or NaNs"):
        _pushed_through(keys, residuals, factorise(covariance))


def test_a_factor_solves_many_right_hand_sides() -> None:
    factor = Factor(torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64), 0.0)
    right = torch.tensor([[4.0, 2.0], [2.0, 10.0]], dtype=torch.float64)
    assert torch.allclose(factor.solve(right), torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double())
