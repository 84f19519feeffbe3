"""The scope classifier's numbers: against autograd, against plain formulas, and at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.editing.serac import scope
from tests.cases import draw
from tests.oracles import serac as oracle


def test_the_loss_has_the_gradient_that_the_formula_has() -> None:
    """In two dimensions, by hand: d/du of d is 2 scale (u - x), of -log(1 - s) -d' / expm1(d)."""
    edits = draw(3, 2, seed=1).requires_grad_()
    inside, outside, scale = draw(3, 2, seed=2), draw(3, 2, seed=3), 0.7
    loss = scope.balanced_loss(
        scope.distances(edits, inside, scale), scope.distances(edits, outside, scale)
    )
    (found,) = torch.autograd.grad(loss, edits)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for i in range(3):
        for j in range(2):
            near = 2 * scale * float(edits[i, j] - inside[i, j])
            far = 2 * scale * float(edits[i, j] - outside[i, j])
            distance = scale * float(((edits[i] - outside[i]) ** 2).sum())
            expected[i, j] = near / 3 - far / math.expm1(distance) / 3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    edits, inside, outside = (draw(4, 3, seed=seed).requires_grad_() for seed in (4, 5, 6))

    def loss(*embeddings: torch.Tensor) -> torch.Tensor:
        edit, near, far = embeddings
        return scope.balanced_loss(
            scope.distances(edit, near, 1.0), scope.all_distances(edit, far, 1.0)
        )

    assert torch.autograd.gradcheck(loss, (edits, inside, outside))


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 20), min_size=1), st.lists(st.floats(1e-3, 20), min_size=1))
def test_the_loss_is_the_plain_one_of_similarities(near: list[float], far: list[float]) -> None:
    found = scope.balanced_loss(
        torch.tensor(near, dtype=torch.float64), torch.tensor(far, dtype=torch.float64)
    )
    plain = oracle.balanced_loss([math.exp(-d) for d in near], [math.exp(-d) for d in far])
    assert float(found) == pytest.approx(plain, rel=1e-6, abs=1e-6)


def test_equal_embeddings_have_similarity_one_and_a_finite_loss() -> None:
    edits = draw(2, 3).float().requires_grad_()
    distance = scope.distances(edits, edits.detach().clone(), 1.0)
    assert scope.similarity(distance).tolist() == [1.0, 1.0]
    loss = scope.balanced_loss(distance, distance)
    loss.backward()
    assert edits.grad is not None
    assert bool(loss.isfinite()) and bool(edits.grad.isfinite().all())


def test_tiny_distances_keep_their_digits() -> None:
    distance = torch.tensor([1e-7, 1e-4], dtype=torch.float32)
    found = scope.log_out_of_scope(distance)
    expected = [math.log(-math.expm1(-1e-4))]
    assert found[1:].tolist() == pytest.approx(expected, rel=1e-5)
    # Written as log(1 - exp(-d)) the first would be -15.9 or -inf: float32 ends at 6e-8.
    assert float(found[0]) == pytest.approx(math.log(torch.finfo(torch.float32).eps), rel=1e-2)


def test_hardest_leaves_out_an_edits_own_question() -> None:
    distance = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 4.0]])
    assert scope.hardest(distance, 1).tolist() == [1.0, 4.0]
    assert scope.hardest(distance, 9).tolist() == [1.0, 3.0, 4.0, 5.0]
