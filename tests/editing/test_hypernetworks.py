"""The networks of MEND, MALMEN and KE against their plain forms and their algebra."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.editing.gradients import Condition, Factors, TargetGradients
from pipeline.editing.hypernetworks import malmen
from pipeline.editing.hypernetworks.ke import KnowledgeEditorNetwork
from pipeline.editing.hypernetworks.malmen import MalmenNetwork
from pipeline.editing.hypernetworks.mend import MendNetwork
from pipeline.editing.hypernetworks.network import HyperNetwork
from pipeline.editing.solve import RidgeSystem
from tests.cases import EDITS, Case, case, draw, relative_error
from tests.oracles import gradients as plain_gradients
from tests.oracles import hypernetworks as oracle

LAYERS = (1, 3)
SIZES = {1: (3, 5), 3: (3, 5)}
FAMILIES = ["gpt2", "gptj", "llama", "qwen2"]


def _factors(rows: int = 7, seed: int = 0, sizes: dict[int, tuple[int, int]] = SIZES) -> Factors:
    return Factors(
        draw(2, seed=seed),
        {layer: draw(rows, f, seed=seed + layer) for layer, (_, f) in sizes.items()},
        {layer: draw(rows, d, seed=seed + layer + 50) for layer, (d, _) in sizes.items()},
    )


def _moved(network: HyperNetwork, seed: int = 9, scale: float = 0.3) -> Any:
    """The network in float64 with every parameter moved, so that none is as it begins."""
    network.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).double())
    return network


def _mend(**choices: Any) -> MendNetwork:
    settings = {"rank": 4, "hidden_layers": 1, "edit_rate": 0.3, "seed": 0, **choices}
    return MendNetwork(SIZES, **settings).double()


def _malmen(sizes: dict[int, tuple[int, int]] = SIZES) -> MalmenNetwork:
    return MalmenNetwork(sizes, rank=4, blocks=2, edit_rate=0.3, seed=0).double()


def _pairs(factors: Factors, layer: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(factors.keys[layer], factors.gradients[layer], strict=True))


def _moments(factors: Factors) -> tuple[Tensor, Tensor]:
    both = [torch.cat([factors.keys[layer], factors.gradients[layer]], dim=1) for layer in SIZES]
    rows = torch.cat(both)
    return rows.mean(0), rows.std(0, correction=0)


def _of_stack(network: HyperNetwork) -> dict[str, Tensor]:
    prefix = "stacks.of_shape.3x5.blocks."
    return {
        name.removeprefix(prefix): parameter
        for name, parameter in network.named_parameters()
        if name.startswith(prefix)
    }


def _tiny_factors(tiny: Case) -> Factors:
    prompts = tiny.prompts(EDITS, ["{}"])
    return TargetGradients(tiny.editable, prompts, LAYERS, "target_tokens", 512).factors("all")


@pytest.mark.parametrize("family", FAMILIES)
def test_at_first_and_without_scaling_mend_is_a_gradient_step(family: str) -> None:
    tiny = case(family)
    factors = _tiny_factors(tiny)
    sizes = {layer: (32, 64) for layer in LAYERS}
    network = MendNetwork(
        sizes, rank=4, hidden_layers=1, edit_rate=0.3, seed=0, normalises=False
    ).double()
    downs = [tiny.down_projections[layer] for layer in LAYERS]
    _, expected = plain_gradients.gradients(
        tiny.model, tiny.tokenizer, downs, EDITS, ["{}"], last_prompt_token=False
    )
    rate = float(network.rates["1"].detach())
    for layer, gradient in zip(LAYERS, expected, strict=True):
        update = network.edit(factors)[layer].matrix()
        assert relative_error(update, -rate * gradient) < max(tiny.tolerance, 1e-6)


def test_rows_without_a_gradient_or_a_key_change_nothing() -> None:
    network = _moved(_mend())
    factors = _factors()
    padded = Factors(
        factors.losses,
        {
            k: torch.cat([v, draw(2, 5), torch.zeros(2, 5).double()])
            for k, v in factors.keys.items()
        },
        {
            k: torch.cat([v, torch.zeros(2, 3).double(), draw(2, 3)])
            for k, v in factors.gradients.items()
        },
    )
    assert network.seen_in(padded)["3x5"].count == network.seen_in(factors)["3x5"].count == 14
    network.take(network.seen_in(factors))
    for layer, update in network.updates(factors).items():
        assert torch.equal(network.updates(padded)[layer], update)


def test_the_normaliser_holds_the_moments_of_all_it_has_seen() -> None:
    network, parts = _mend(), [_factors(rows, seed=rows) for rows in (1, 4, 9)]
    for part in parts:
        network.take(network.seen_in(part))
    mean, deviation = _moments(Factors.joined(parts))
    held = network.stacks.normalisers.of_shape["3x5"].moments
    assert held.count == 28 and torch.allclose(held.mean, mean)
    assert torch.allclose((held.squares / held.count).sqrt(), deviation)


def test_a_stack_is_the_identity_at_first() -> None:
    rows = draw(4, 8)
    for network in (_mend(), _malmen()):
        assert torch.equal(network.stacks.of_shape["3x5"](rows, 1), rows)


@pytest.mark.parametrize("hidden_layers", [0, 2])
def test_mend_is_the_plain_sum_over_tokens(hidden_layers: int) -> None:
    network = _moved(_mend(hidden_layers=hidden_layers))
    factors = _factors()
    network.take(network.seen_in(factors))
    found = network.updates(factors)
    for number, layer in enumerate(SIZES):
        expected = oracle.mend_update(
            _pairs(factors, layer), _of_stack(network), network.rates[str(layer)],
            _moments(factors), number, hidden_layers + 1,
        )  # fmt: skip
        assert relative_error(found[layer].detach(), expected.detach()) < 1e-12


@pytest.mark.parametrize("rows", [3, 7])
def test_malmens_gradients_by_hand_are_those_of_autograd(rows: int) -> None:
    """Fewer rows than a key has entries, and more."""
    network, factors = _moved(_malmen(), scale=0.1), _factors(rows)
    network.take(network.seen_in(factors))
    slopes = {layer: draw(*size, seed=layer + 7) for layer, size in SIZES.items()}
    total = torch.zeros(()).double()
    for number, layer in enumerate(SIZES):
        update = oracle.malmen_update(
            _pairs(factors, layer), _of_stack(network), network.rates[str(layer)],
            network.log_ridges[str(layer)], _moments(factors), number, 2,
        )  # fmt: skip
        found = network.edit(factors)[layer].matrix()
        assert relative_error(found, update.detach()) < 1e-6
        total = total + (slopes[layer] * update).sum()
    named = dict(network.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
    found_by_hand = network.gradients(factors, slopes)
    assert found_by_hand.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found_by_hand[name], gradient, rtol=1e-8, atol=1e-10), name


def test_malmens_gradients_do_not_depend_on_how_many_rows_are_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, factors = _moved(_malmen(), scale=0.1), _factors(30)
    network.take(network.seen_in(factors))
    slopes = {layer: draw(*size, seed=layer + 7) for layer, size in SIZES.items()}
    expected, edits = network.gradients(factors, slopes), network.edit(factors)
    monkeypatch.setattr(malmen, "ROWS_AT_ONCE", 7)
    for name, gradient in network.gradients(factors, slopes).items():
        assert torch.allclose(expected[name], gradient, rtol=1e-9, atol=1e-12)
    for layer, update in network.edit(factors).items():
        assert relative_error(update.matrix(), edits[layer].matrix()) < 1e-6


@given(rows=st.integers(1, 12), ridge=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_both_forms_of_the_normal_equation_are_one(rows: int, ridge: float, seed: int) -> None:
    keys, values, matrix = (draw(*s, seed=seed) for s in ((rows, 6), (rows, 4), (4, 6)))
    system = RidgeSystem(keys, ridge)
    assert system.is_dual == (rows < 6)
    inverse = torch.linalg.inv(keys.T @ keys + ridge * torch.eye(6).double())
    left, right = system.regression(values)
    assert torch.allclose(left @ right, values.T @ keys @ inverse, rtol=1e-8, atol=1e-9)
    assert torch.allclose(system.divided(matrix), matrix @ inverse, rtol=1e-7, atol=1e-8)


def test_the_normal_equation_at_its_ends() -> None:
    network, factors = _malmen(), _factors(3)
    network.take(network.seen_in(_factors(20, seed=3)))
    values = network.values(factors.keys[1], factors.gradients[1], 1).detach()
    with torch.no_grad():
        network.log_ridges["1"].fill_(40.0)
    assert float(network.edit(factors)[1].matrix().norm()) < 1e-12
    key, value = factors.keys[1][:1], values[:1]
    left, right = RidgeSystem(key, 2.0).regression(value)
    assert torch.allclose(left @ right, value.T @ key / (key.square().sum() + 2.0))
    orthonormal = torch.linalg.qr(draw(5, 3)).Q.T
    left, right = RidgeSystem(orthonormal, 2.0).regression(values)
    assert torch.allclose(left @ right @ orthonormal.T, values.T / 3.0)


def _condition() -> Condition:
    return Condition(draw(1, 6, seed=1), draw(2, 6, seed=2), draw(4, 6, seed=3))


def _ke(begins: Literal["random", "descent"] = "random") -> KnowledgeEditorNetwork:
    return KnowledgeEditorNetwork(
        SIZES,
        6,
        condition_size=7,
        hidden_size=5,
        lstm_size=4,
        max_scale=0.5,
        begins=begins,
        seed=0,
    ).double()


def test_kes_gates_are_of_rank_one_and_its_rows_of_sum_one() -> None:
    network = _ke()
    read = network.read(_condition())
    for layer in SIZES:
        *both, scale = network.gates_of(read, layer)
        vectors = network.gates[str(layer)](read).split([5, 3, 5, 3, 1])
        for gate, vector, rows in zip(both, vectors[::2], vectors[1::2], strict=False):
            assert torch.linalg.matrix_rank(gate, atol=1e-12) == 1
            assert torch.allclose(gate.sum(dim=0), vector, rtol=1e-12)
            assert torch.allclose(gate, torch.outer(rows.softmax(0), vector), rtol=1e-12)
        assert 0 < float(scale.detach()) < 0.5


def test_kes_update_is_the_gated_gradient() -> None:
    network, factors = _ke(), _factors()
    factors = Factors(factors.losses[:1], factors.keys, factors.gradients, (_condition(),))
    last = network.gates["1"][2]
    bias = torch.zeros(17).double()

    def updated(vector: float, scale: float) -> Tensor:
        bias[:5], bias[16] = vector, scale
        with torch.no_grad():
            # Weights of no length: what comes out is the bias.
            last.parametrizations.weight.original0.zero_()
            last.bias.copy_(bias)
        return network.updates(factors)[1].detach()

    # a = 3 c in every row, since softmax of equal numbers is a third; b = 0.
    found = updated(6.0, 0.7)
    scale = 0.5 * torch.sigmoid(torch.tensor(0.7).double())
    assert torch.allclose(found, 2.0 * scale * factors.matrix(1))
    assert float(updated(6.0, -800.0).abs().max()) == 0.0


def test_ke_can_begin_as_a_plain_step_down_the_gradient_and_learns_from_there() -> None:
    network, factors = _ke("descent"), _factors()
    factors = Factors(factors.losses[:1], factors.keys, factors.gradients, (_condition(),))
    updates = network.updates(factors)
    for layer, (outputs, _) in SIZES.items():
        step = 0.5 / (2 * outputs)
        assert torch.allclose(updates[layer], -step * factors.matrix(layer), rtol=1e-12)
    slopes = {layer: draw(*size, seed=layer) for layer, size in SIZES.items()}
    found = network.gradients(factors, slopes)
    for layer in SIZES:
        assert float(found[f"gates.{layer}.2.parametrizations.weight.original0"].norm()) > 0


@pytest.mark.parametrize("name", ["mend", "ke"])
def test_gradients_are_finite_differences(name: str) -> None:
    network = _moved(_mend() if name == "mend" else _ke(), scale=0.1)
    factors = _factors()
    factors = Factors(factors.losses, factors.keys, factors.gradients, (_condition(),))
    network.take(network.seen_in(factors))
    slopes = {layer: draw(*size, seed=layer) for layer, size in SIZES.items()}
    found = network.gradients(factors, slopes)

    def total() -> float:
        updates = network.updates(factors)
        return sum(float((slopes[k] * update).sum()) for k, update in updates.items())

    for parameter_name, parameter in network.named_parameters():
        direction = draw(parameter.numel(), seed=4).view(parameter.shape)
        along = float((found[parameter_name] * direction).sum())
        with torch.no_grad():
            parameter.add_(1e-5 * direction)
            above = total()
            parameter.sub_(2e-5 * direction)
            below = total()
            parameter.add_(1e-5 * direction)
        assert along == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-7), parameter_name
    if name == "mend":
        # With respect to its rate an update is linear: dL/drate = - <slope, sum of d~ x~^T>.
        update = network.updates(factors)[1].detach()
        rate = float(network.rates["1"].detach())
        assert float(found["rates.1"]) == pytest.approx(float((slopes[1] * update).sum()) / rate)
