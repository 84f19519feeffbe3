"""MEMIT put together from the core's parts against the plain one: every family, to the weights."""

from functools import cache

import pytest
import torch
from torch import Tensor

from pipeline.editing.covariance import gram_sums
from pipeline.editing.equations import FewEdits, ManyEdits
from pipeline.editing.keys import KeyWave
from pipeline.editing.update import EditedWeights, Update
from pipeline.editing.values import ValueSettings
from pipeline.methods import CLOSED_FORM, ClosedForm, build_closed_form
from pipeline.spec import MethodSpec, ValueSpec
from tests.cases import (
    ALL_FAMILIES,
    CONTEXTS,
    SETTINGS,
    THREE,
    Case,
    case,
    draw,
    fresh,
    oracle_values,
    relative_error,
    token_rows,
)
from tests.methods.equations import normal_equations
from tests.oracles.memit import update_weights

LAYERS = (0, 1)
WEIGHT = 5.0
MANY, FEW = 64, 63  # at least as many edits as a key has entries, or fewer


def _method(layers: tuple[int, ...] = LAYERS) -> ClosedForm:
    value = ValueSpec(**SETTINGS)
    return build_closed_form(MethodSpec(layers=layers, covariance_weight=WEIGHT, value=value))


@cache
def _covariances(family: str) -> dict[int, Tensor]:
    """Of random text: enough of it that each inner unit of each family fires (OPT's are ReLUs)."""
    return gram_sums(case(family).editable, LAYERS, token_rows(), 200).covariances()


@cache
def _expected(family: str) -> dict[int, Tensor]:
    tiny = case(family)
    values = [z for z, _ in oracle_values(family, LAYERS[-1])]
    return update_weights(
        tiny.model,
        tiny.tokenizer,
        tiny.blocks,
        tiny.down_projections,
        LAYERS,
        THREE,
        CONTEXTS,
        _covariances(family),
        WEIGHT,
        values,
    )


def _edit(tiny: Case, values_ND: Tensor, num_edits: int) -> tuple[EditedWeights, dict[int, Update]]:
    """Edit a model layer by layer, its edits in two shards, as the cluster does."""
    method, prompts = _method(), tiny.prompts(THREE)
    shards = [slice(0, 1), slice(1, 3)]
    waves = [KeyWave(tiny.editable, prompts[shard], 1, max_tokens=40) for shard in shards]
    weights = EditedWeights(tiny.editable, method.layers)
    updates = {}
    for layer in method.layers:
        equations = normal_equations(method, _covariances(tiny.family)[layer], num_edits)
        assert isinstance(equations, ManyEdits if num_edits >= 64 else FewEdits)
        for wave, shard in zip(waves, shards, strict=True):
            equations.add(*method.keys_and_residuals(wave, layer, values_ND[shard]))
        updates[layer] = equations.solve()
        weights.apply(layer, updates[layer].matrix())
    return weights, updates


@cache
def _values(family: str) -> Tensor:
    tiny = case(family)
    found = _method().find_values(tiny.editable, tiny.prompts(THREE), batch_size=2)
    return torch.stack([value.z for value in found])


@pytest.mark.parametrize("num_edits", [FEW, MANY])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_final_weights_are_those_of_the_oracle(family: str, num_edits: int) -> None:
    """Updates are stored in float32, which leaves about seven digits of a float64 model's."""
    tiny = fresh(family)
    pristine = {layer: tiny.editable.oriented_weight(layer).clone() for layer in LAYERS}
    weights, updates = _edit(tiny, _values(family), num_edits)
    tolerance = 1e-4 if family in ("gemma2", "gptj") else 1e-6
    for layer, expected in _expected(family).items():
        assert updates[layer].ridge == 0.0
        assert relative_error(updates[layer].matrix(), expected) < tolerance
        final = tiny.editable.oriented_weight(layer)
        assert expected.norm() > 1e-3 * pristine[layer].norm()
        assert relative_error(final, pristine[layer] + expected) < tolerance
    weights.revert()
    assert all(torch.equal(tiny.editable.oriented_weight(n), w) for n, w in pristine.items())


def test_few_and_many_edits_agree() -> None:
    covariance = _covariances("gpt2")[0]
    equations = [normal_equations(_method(), covariance, number) for number in (FEW, MANY)]
    for seed, count in enumerate((4, 1, 30)):
        keys, residuals = draw(count, 64, seed=seed), draw(count, 32, seed=seed + 9)
        for part in equations:
            part.add(keys, residuals)
    few, many = (part.solve() for part in equations)
    assert relative_error(few.matrix(), many.matrix()) < 1e-6
    assert list(many.parts) == ["dense"]


def test_few_edits_travel_as_factors() -> None:
    equations = normal_equations(_method(), _covariances("gpt2")[0], 3)
    equations.add(draw(3, 64), draw(3, 32))
    parts = equations.solve().parts
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "left": (32, 3),
        "right": (3, 64),
    }


def test_half_precision_keys_are_solved_in_float64() -> None:
    keys, residuals = draw(5, 64).bfloat16(), draw(5, 32).float()
    covariance = _covariances("gpt2")[0]
    for number in (FEW, MANY):
        half = normal_equations(_method(), covariance, number)
        half.add(keys, residuals)
        wide = normal_equations(_method(), covariance, number)
        wide.add(keys.double(), residuals.double())
        assert torch.equal(half.solve().matrix(), wide.solve().matrix())


def test_the_covariance_is_left_alone() -> None:
    covariance = _covariances("gpt2")[0].clone()
    for number in (FEW, MANY):
        equations = normal_equations(_method(), covariance, number)
        equations.add(draw(5, 64), draw(5, 32))
        equations.solve()
    assert torch.equal(covariance, _covariances("gpt2")[0])


def test_a_singular_covariance_is_reported() -> None:
    covariance = torch.zeros(64, 64, dtype=torch.float64)
    covariance[0, 0] = 1.0
    for number in (FEW, MANY):
        equations = normal_equations(_method(), covariance, number)
        equations.add(draw(2, 64), draw(2, 32))
        update = equations.solve()
        assert update.ridge > 0
        assert torch.isfinite(update.matrix()).all()


@pytest.mark.parametrize("number", [FEW, MANY])
def test_no_edits_cannot_be_solved(number: int) -> None:
    with pytest.raises(ValueError, match="no edit"):
        normal_equations(_method(), _covariances("gpt2")[0], number).solve()


@pytest.mark.parametrize("number", [FEW, MANY])
@pytest.mark.parametrize("place", ["keys", "residuals"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_become_an_update(number: int, place: str, bad: float) -> None:
    keys, residuals = draw(4, 64), draw(4, 32)
    (keys if place == "keys" else residuals)[2, 3] = bad
    equations = normal_equations(_method(), _covariances("gpt2")[0], number)
    with pytest.raises(ValueError, match="infinities or NaNs"):
        equations.add(keys, residuals)
        equations.solve()


def test_each_layer_takes_its_share_of_what_is_missing() -> None:
    tiny = case("llama")
    method = _method((0, 1, 3))
    values = draw(3, 32)
    wave = KeyWave(tiny.editable, tiny.prompts(THREE), 3, max_tokens=40)
    plain = KeyWave(tiny.editable, tiny.prompts(THREE), 3, max_tokens=40)
    for layer, share in ((0, 3), (1, 2), (3, 1)):
        keys, residuals = method.keys_and_residuals(wave, layer, values)
        expected_keys, hidden = plain.read(layer)
        assert torch.equal(keys, expected_keys)
        assert torch.equal(residuals, (values - hidden) / share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residuals_of_a_half_precision_model_are_wide(dtype: torch.dtype) -> None:
    tiny = case("gpt2", dtype)
    wave = KeyWave(tiny.editable, tiny.prompts(THREE), 1, max_tokens=40)
    keys, residuals = _method().keys_and_residuals(wave, 0, draw(3, 32).float())
    assert keys.dtype == dtype and residuals.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_raises_the_probability_of_its_target(dtype: torch.dtype) -> None:
    """In the types that models come in, the values are reached far better than before."""
    tiny = fresh("llama", dtype)
    method, prompts = _method(), tiny.prompts(THREE)
    found = method.find_values(tiny.editable, prompts, 3)
    values = torch.stack([value.z for value in found])
    _, before = KeyWave(tiny.editable, prompts, 1, max_tokens=40).read(0)
    weights, _ = _edit(tiny, values, FEW)
    _, after = KeyWave(tiny.editable, prompts, 1, max_tokens=40).read(0)
    gone = (values - after.float()).norm(dim=1) / (values - before.float()).norm(dim=1)
    assert gone.max() < 0.9
    weights.revert()
    _, restored = KeyWave(tiny.editable, prompts, 1, max_tokens=40).read(0)
    assert torch.equal(restored, before)


def test_a_method_is_built_from_its_spec() -> None:
    value = ValueSpec(**SETTINGS)
    spec = MethodSpec(name="memit", layers=(1, 3), covariance_weight=7.0, value=value)
    method = build_closed_form(spec)
    assert isinstance(method, CLOSED_FORM["memit"])
    assert (method.layers, method.spec) == ((1, 3), spec)
    assert method.value == ValueSettings(**SETTINGS)
