"""Adam in a box around the weights (FT-L), from gradients that are made up."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from pipeline.editing.descent import Descent, DescentSettings, Step
from pipeline.editing.gradients import Factors
from tests.cases import draw

SIZE = {1: (3, 5), 3: (4, 6)}


def _weights(seed: int = 50) -> dict[int, Tensor]:
    return {layer: draw(*size, seed=seed + layer) for layer, size in SIZE.items()}


def _factors(seed: int, scale: float = 1.0) -> Factors:
    """Of two edits, seven tokens."""
    return Factors(
        draw(2, seed=seed).abs() + 1.0,
        {layer: scale * draw(7, f, seed=seed + layer) for layer, (_, f) in SIZE.items()},
        {layer: draw(7, d, seed=seed + layer + 9) for layer, (d, _) in SIZE.items()},
    )


def _steps(
    how: DescentSettings, pristine: Mapping[int, Tensor] | None = None, scale: float = 1.0
) -> list[Step]:
    weights = _weights()
    descent = Descent(weights, weights if pristine is None else pristine, how)
    steps = []
    for number in range(6):
        descent.add(_factors(10 * number, scale))
        steps.append(descent.step())
    return steps


def _changes(step: Step) -> dict[int, Tensor]:
    assert step.changes is not None
    return step.changes


@settings(deadline=None, max_examples=40)
@given(
    bound=st.floats(1e-6, 10.0),
    rate=st.floats(1e-6, 10.0),
    moved=st.floats(-1.0, 1.0),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e6]),
    decay=st.sampled_from([0.0, 0.3]),
)
def test_after_every_step_no_entry_is_further_away_than_the_bound(
    bound: float, rate: float, moved: float, scale: float, decay: float
) -> None:
    """From wherever in the box earlier rounds left the weights, whatever the gradients are."""
    weights = _weights()
    before = {
        layer: moved * bound * draw(*weight.shape, seed=layer).tanh()
        for layer, weight in weights.items()
    }
    pristine = {layer: weight - before[layer] for layer, weight in weights.items()}
    for step in _steps(DescentSettings(rate, decay, 0.0, bound), pristine, scale):
        for layer, change in _changes(step).items():
            gone = weights[layer] + change.double() - pristine[layer]
            # Of weights of length one, float64 subtracts to 1e-16.
            assert float(gone.abs().max()) <= bound * (1 + 1e-6) + 1e-15


def test_a_box_without_end_is_none_and_one_without_room_lets_nothing_move() -> None:
    free, endless, closed = (
        _steps(DescentSettings(0.1, 0.2, 0.0, bound)) for bound in (None, float("inf"), 0.0)
    )
    for one, other, none in zip(free, endless, closed, strict=True):
        for layer, change in _changes(one).items():
            assert torch.equal(change, _changes(other)[layer]) and float(change.abs().min()) > 0
            assert not _changes(none)[layer].any()


def test_without_a_learning_rate_nothing_changes() -> None:
    for step in _steps(DescentSettings(0.0, 0.0, 0.0, None)):
        assert not any(change.any() for change in _changes(step).values())


@pytest.mark.parametrize("seed", range(2))
def test_in_a_convex_problem_a_smaller_box_never_has_the_lower_loss(seed: int) -> None:
    """Linear softmax regression; Adam comes near the optimum of each box."""
    inputs, labels = draw(30, 5, seed=seed), torch.arange(30) % 4
    start = 0.1 * draw(4, 5, seed=seed + 1)
    bounds, found = (0.0, 0.01, 0.1, 0.3, 1.0, float("inf")), []
    for bound in bounds:
        descent = Descent({0: start}, {0: start}, DescentSettings(0.05, 0.0, 0.0, bound))
        weight = start
        for _ in range(150):
            logits = inputs @ weight.T
            slopes = logits.softmax(-1) - one_hot(labels, 4).double()
            losses = cross_entropy(logits, labels, reduction="none")
            descent.add(Factors(losses, {0: inputs}, {0: slopes}))
            weight = start + _changes(descent.step())[0].double()
        found.append(float(cross_entropy(inputs @ weight.T, labels)))
    assert found == sorted(found, reverse=True)
    assert found[0] == float(cross_entropy(inputs @ start.T, labels)) > 1.01 * found[-1]
