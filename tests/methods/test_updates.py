"""Identities of every method's update, for any shape, and each against the paper's own formula."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.editing.equations import ManyEdits, Penalty
from pipeline.editing.update import Update
from pipeline.methods import CLOSED_FORM, ClosedForm, build_closed_form
from pipeline.methods.alphaedit import null_space
from pipeline.methods.prune import prune
from pipeline.methods.rect import rect
from pipeline.spec import MethodSpec, ValueSpec
from tests.cases import SETTINGS, draw, relative_error
from tests.methods.equations import normal_equations
from tests.oracles import updates as oracle

_SHAPES = st.tuples(st.integers(1, 14), st.integers(4, 10), st.integers(1, 5))  # N, F, D
_SEEDS = st.integers(0, 10_000)
_WEIGHTS = st.sampled_from([0.05, 1.0, 30.0])
# Updates are kept in float32.
_FLOAT32 = 1e-5

Shape = tuple[int, int, int]


def _method(name: str, **settings: Any) -> ClosedForm:
    spec = {"name": name, "layers": (1,), "covariance_weight": 2.0, **settings}
    return build_closed_form(MethodSpec.model_validate({**spec, "value": ValueSpec(**SETTINGS)}))


def _problem(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (N, F), residuals (N, D) and a positive definite covariance (F, F)."""
    count, size, hidden = shape
    samples = draw(3 * size + 5, size, seed=seed)
    covariance = samples.T @ samples / len(samples)
    return draw(count, size, seed=seed + 1), draw(count, hidden, seed=seed + 2), covariance


def _deficient(size: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A covariance of that rank, and the keys (rank, F) that it is made of."""
    keys = draw(rank, size, seed=seed)
    return keys.T @ keys / rank, keys


def _solve(
    method: ClosedForm,
    keys: Tensor,
    residuals: Tensor,
    covariance: Tensor,
    past: Tensor | None = None,
) -> Update:
    """Solve with the keys in two shards."""
    past_FF = None if past is None else past.T @ past
    equations = normal_equations(method, covariance, len(keys), past_FF)
    cut = len(keys) // 2
    for shard in (slice(0, cut), slice(cut, None)):
        if len(keys[shard]):
            equations.add(keys[shard], residuals[shard])
    return equations.solve()


def _matrix(*arguments: Any, **named: Any) -> Tensor:
    return _solve(*arguments, **named).matrix().double()


@settings(deadline=None, max_examples=40)
@given(_SHAPES, _WEIGHTS, st.sampled_from([0.0, 0.3, 20.0]), st.integers(1, 9), _SEEDS)
def test_memit_accumulated_is_the_papers(
    shape: Shape, weight: float, norm: float, num_past: int, seed: int
) -> None:
    keys, residuals, covariance = _problem(shape, seed)
    past = draw(num_past, shape[1], seed=seed + 3)
    method = _method("memit_accumulated", covariance_weight=weight, norm_penalty=norm)
    arguments = keys.T, residuals.T, covariance, weight
    expected = oracle.accumulated(*arguments, past.T, norm)
    assert relative_error(_matrix(method, keys, residuals, covariance, past), expected) < _FLOAT32
    # In the first round there is nothing to remember; plain MEMIT never remembers.
    nothing = torch.zeros(shape[1], 1, dtype=torch.float64)
    first = oracle.accumulated(*arguments, nothing, norm)
    assert relative_error(_matrix(method, keys, residuals, covariance), first) < _FLOAT32
    plain = _method("memit", covariance_weight=weight, norm_penalty=norm)
    assert relative_error(_matrix(plain, keys, residuals, covariance, past), first) < _FLOAT32


def test_two_rounds_that_remember_write_what_one_batch_writes() -> None:
    """The second round's normal equations are the batch's, its right side lacks the first's."""
    keys, residuals, covariance = _problem((6, 9, 4), 5)
    method = _method("memit_accumulated")
    first = _matrix(method, keys[:4], residuals[:4], covariance)
    lacking = residuals[4:] - keys[4:] @ first.T
    second = _matrix(method, keys[4:], lacking, covariance, past=keys[:4])
    assert relative_error(first + second, _matrix(method, keys, residuals, covariance)) < _FLOAT32


@settings(deadline=None, max_examples=40)
@given(_SHAPES, _WEIGHTS, st.sampled_from([0.01, 0.1, 3.0]), _SEEDS)
def test_damped_emmet_is_the_papers_and_memits(
    shape: Shape, weight: float, damping: float, seed: int
) -> None:
    keys, residuals, covariance = _problem(shape, seed)
    method = _method("emmet", covariance_weight=weight, emmet={"damping": damping})
    found = _matrix(method, keys, residuals, covariance)
    expected = oracle.emmet(keys.T, residuals.T, covariance, weight, damping)
    assert relative_error(found, expected) < _FLOAT32
    memit = _method("memit", covariance_weight=weight * damping)
    assert relative_error(found, _matrix(memit, keys, residuals, covariance)) < _FLOAT32


@settings(deadline=None, max_examples=40)
@given(_SHAPES, _WEIGHTS, _SEEDS)
def test_undamped_emmet_writes_exactly_at_the_least_cost(
    shape: Shape, weight: float, seed: int
) -> None:
    count = min(shape[0], shape[1] - 2)
    keys, residuals, covariance = _problem((count, *shape[1:]), seed)
    method = _method("emmet", covariance_weight=weight, emmet={"damping": 0})
    update = _solve(method, keys, residuals, covariance)
    found = update.matrix().double()
    scale = 1 + float(found.norm())
    assert update.ridge == 0.0
    assert (keys @ found.T - residuals).abs().max() < _FLOAT32 * scale * float(keys.norm())
    # Any other update that writes the same costs more: D C Q^T = 0 for every Q with Q K = 0.
    other = draw(shape[2], shape[1], seed=seed + 9)
    other = other - other @ keys.T @ torch.linalg.inv(keys @ keys.T) @ keys
    cross = torch.trace(found @ covariance @ other.T).abs()
    assert cross < 1e-4 * scale * float(other.norm()) * float(covariance.norm())


def test_undamped_emmet_has_its_limits() -> None:
    keys, residuals, covariance = _problem((5, 4, 3), 0)
    method = _method("emmet", emmet={"damping": 0})
    with pytest.raises(ValueError, match=r"5 edits .* key has entries \(4\)"):
        _solve(method, keys, residuals, covariance)
    twice = torch.cat([keys[:1], keys[:1]])
    assert _solve(method, twice, residuals[:2], covariance).ridge > 0  # and says so


@settings(deadline=None, max_examples=40)
@given(_SHAPES, st.sampled_from([0.1, 10.0]), st.integers(0, 9), _SEEDS)
def test_alphaedit_is_the_papers(shape: Shape, ridge: float, num_past: int, seed: int) -> None:
    keys, residuals, _ = _problem(shape, seed)
    covariance, _ = _deficient(shape[1], shape[1] // 2, seed)
    past = draw(num_past, shape[1], seed=seed + 3)
    method = _method("alphaedit", alphaedit={"ridge": ridge, "threshold": 1e-6})
    expected = oracle.alphaedit(keys.T, residuals.T, covariance, 1e-6, ridge, past.T)
    update = _solve(method, keys, residuals, covariance, past if num_past else None)
    assert relative_error(update.matrix(), expected) < _FLOAT32
    assert update.rank == shape[1] - shape[1] // 2


@settings(deadline=None, max_examples=20)
@given(_SHAPES, _SEEDS)
def test_alphaedit_leaves_old_keys_alone(shape: Shape, seed: int) -> None:
    keys, residuals, _ = _problem(shape, seed)
    covariance, old = _deficient(shape[1], shape[1] // 2, seed)
    method = _method("alphaedit", alphaedit={"threshold": 1e-6, "ridge": 0.1})
    found = _matrix(method, keys, residuals, covariance)
    assert (old @ found.T).abs().max() < _FLOAT32 * (1 + found.norm()) * (1 + old.norm())


def test_a_null_space_of_everything_is_ridge_regression() -> None:
    keys, residuals, covariance = _problem((5, 9, 4), 1)
    method = _method("alphaedit", alphaedit={"threshold": 1e6, "ridge": 3.0})
    update = _solve(method, keys, residuals, covariance)
    expected = residuals.T @ keys @ torch.linalg.inv(keys.T @ keys + 3.0 * torch.eye(9))
    assert relative_error(update.matrix(), expected) < _FLOAT32
    assert update.rank == 9
    assert set(update.parts) == {"left", "right"} or update.parts["dense"].shape == (4, 9)


def test_alphaedit_writes_the_same_batch_less_the_second_time() -> None:
    keys, residuals, _ = _problem((3, 9, 4), 2)
    covariance, _ = _deficient(9, 3, 2)
    method = _method("alphaedit", alphaedit={"threshold": 1e-6, "ridge": 0.5})
    first = _matrix(method, keys, residuals, covariance)
    lacking = residuals - keys @ first.T
    assert lacking.norm() < residuals.norm()
    second = _matrix(method, keys, lacking, covariance, past=keys)
    assert (lacking - keys @ second.T).norm() < lacking.norm()


def test_a_null_space_without_a_direction_is_refused() -> None:
    keys, residuals, covariance = _problem((3, 6, 2), 3)
    method = _method("alphaedit", alphaedit={"threshold": 1e-9})
    with pytest.raises(ValueError, match=r"below method\.alphaedit\.threshold 1e-09 \(absolute\)"):
        _solve(method, keys, residuals, covariance)


@settings(deadline=None, max_examples=20)
@given(st.integers(3, 12), _SEEDS, st.sampled_from([0.5, 8.0, 1024.0]))
def test_a_relative_threshold_does_not_feel_the_models_scale(
    size: int, seed: int, scale: float
) -> None:
    covariance = _problem((1, size, 1), seed)[2]
    basis = null_space(covariance, 0.4, relative=True)
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    assert null_space(scale * covariance, 0.4, relative=True).shape == basis.shape
    values = torch.linalg.svdvals(covariance)
    assert basis.shape[1] == int((values < 0.4 * values.mean()).sum())


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 10), st.integers(1, 5), _SEEDS)
def test_rome_is_the_papers(size: int, hidden: int, seed: int) -> None:
    keys, residual, covariance = _problem((2, size, hidden), seed)
    key, bare, residual = keys[0], keys[1], residual[:1]
    covariance_weight = {"covariance_weight": None}
    for form in ("r-rome", "p-rome"):
        method = _method("rome", rome={"form": form}, **covariance_weight)
        found = _matrix(method, key[None], residual, covariance)
        expected = oracle.rome(key, key, residual[0], covariance)
        assert relative_error(found, expected) < _FLOAT32
        # One undamped EMMET edit, and the value is written.
        emmet = _method("emmet", emmet={"damping": 0})
        assert relative_error(found, _matrix(emmet, key[None], residual, covariance)) < _FLOAT32
        assert relative_error(found @ key, residual[0]) < 1e-4
    plain = _method("rome", rome={"covariance": "identity"}, **covariance_weight)
    found = _matrix(plain, key[None], residual, covariance)
    assert relative_error(found, torch.outer(residual[0], key) / key.square().sum()) < _FLOAT32
    method = _method("rome", rome={"form": "original"}, **covariance_weight)
    found = _matrix(method, torch.cat([key, bare])[None], residual, covariance)
    expected = oracle.rome(key, bare, residual[0], covariance)
    assert relative_error(found, expected) < _FLOAT32
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == 1


def test_rome_takes_one_edit() -> None:
    keys, residuals, covariance = _problem((2, 6, 3), 0)
    method = _method("rome", rome={"form": "p-rome"})
    with pytest.raises(ValueError, match="one edit at a time, not 2"):
        _solve(method, keys, residuals, covariance)
    with pytest.raises(ValueError, match="no edit"):
        normal_equations(method, covariance, 1).solve()
    orthogonal = torch.eye(6, dtype=torch.float64)[:2].reshape(1, 12)
    with pytest.raises(ValueError, match="right angles"):
        _solve(
            _method("rome", rome={"form": "original"}),
            orthogonal,
            residuals[:1],
            torch.eye(6, dtype=torch.float64),
        )


@pytest.mark.parametrize("name", sorted(set(CLOSED_FORM) - {"rome"}))
def test_the_order_of_edits_does_not_matter_and_shards_are_summed(name: str) -> None:
    keys, residuals, covariance = _problem((5, 8, 3), 7)
    method = _method(name, alphaedit={"threshold": 1.0})
    found = _matrix(method, keys, residuals, covariance)
    backwards = _matrix(method, keys.flip(0), residuals.flip(0), covariance)
    assert relative_error(backwards, found) < _FLOAT32
    many = ManyEdits(method.penalty(covariance))
    many.add(keys, residuals)
    assert relative_error(many.solve().matrix(), found) < _FLOAT32


def test_a_penalty_with_past_keys_leaves_the_kept_one_alone() -> None:
    keys, _, covariance = _problem((5, 8, 3), 8)
    penalty = Penalty(covariance)
    lower = penalty.factor.lower.clone()
    grown = penalty.with_past(keys.T @ keys)
    assert torch.equal(penalty.factor.lower, lower)
    assert relative_error(grown.matrix, covariance + keys.T @ keys) < 1e-12
    assert grown.factor.lower is not penalty.factor.lower


_MATRICES = st.tuples(st.integers(1, 8), st.integers(1, 8), _SEEDS)


@settings(deadline=None, max_examples=40)
@given(_MATRICES, st.floats(0.01, 1.0))
def test_rect_keeps_what_changes_most_relatively(shape: Shape, keep: float) -> None:
    rows, columns, seed = shape
    weight, update = draw(rows, columns, seed=seed), draw(rows, columns, seed=seed + 1)
    found = rect(update, weight, keep)
    kept = found != 0
    assert torch.equal(found[kept], update[kept])
    assert int(kept.sum()) == max(1, update.numel() - round((1 - keep) * update.numel()))
    change = (update / weight).abs()
    if (~kept).any():
        assert change[kept].min() >= change[~kept].max() * (1 - 1e-6)
    assert torch.equal(rect(2 * update, weight, keep), 2 * found)
    assert torch.equal(rect(update, weight, 1.0), update)
    if round(keep * update.numel()) == int(kept.sum()):
        assert torch.equal(found, oracle.rect(update, weight, keep))


@settings(deadline=None, max_examples=40)
@given(_MATRICES, st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([1.2, 2.0, 9.0]))
def test_prune_restrains_the_whole_change(shape: Shape, scale: float, base: float) -> None:
    rows, columns, seed = shape
    pristine, update = draw(rows, columns, seed=seed), scale * draw(rows, columns, seed=seed + 1)
    weight = pristine + draw(rows, columns, seed=seed + 2)
    total = weight - pristine + update
    found = prune(update, weight, pristine, base)
    restrained = weight - pristine + found
    largest = torch.linalg.svdvals(pristine)[0]
    if torch.linalg.svdvals(total)[0] <= largest:
        assert found is update
    assert torch.allclose(restrained, oracle.prune(total, pristine, base), atol=1e-8)
    before, after = torch.linalg.svdvals(total), torch.linalg.svdvals(restrained)
    assert (after <= before + 1e-9).all()
    # Again does nothing more to what is no longer large.
    calm = before <= largest
    assert torch.allclose(after[calm], before[calm], atol=1e-8)


def test_wrappers_act_in_their_order_and_keep_what_is_said_of_the_update() -> None:
    weight, pristine = draw(4, 6), draw(4, 6, seed=1)
    update = Update.of(draw(4, 6, seed=2) * 5, ridge=0.25, rank=3)
    plain = _method("memit")
    assert plain.wrap(update, weight, pristine) is update
    both = _method("memit", wrappers=["prune", "rect"], rect={"keep": 0.5})
    wrapped = both.wrap(update, weight, pristine)
    expected = rect(prune(update.matrix(), weight, pristine, 1.2), weight, 0.5)
    assert relative_error(wrapped.matrix(), expected) < _FLOAT32
    assert (wrapped.ridge, wrapped.rank) == (0.25, 3)
    assert int((wrapped.matrix() != 0).sum()) == 12
