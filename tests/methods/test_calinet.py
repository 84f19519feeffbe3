"""CaliNET: slots beside the network, against the plain loss and what the method's sheet asks."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from pipeline.editing.adapter_rows import AdapterRows
from pipeline.editing.adapters import NeuronBank
from pipeline.editing.calibration import first_banks
from pipeline.editing.patches import PatchSettings
from pipeline.editing.patching import _beside, _Patches
from pipeline.editing.update import EditedWeights
from pipeline.methods import build_gradient_method
from pipeline.methods.calinet import CaliNet
from pipeline.methods.gradient import Making
from pipeline.prompts import EditPrompts
from pipeline.spec import MethodSpec
from tests import families
from tests.cases import (
    CONTEXTS,
    EDITS,
    Case,
    case,
    confident,
    draw,
    fresh,
    relative_error,
    token_rows,
)
from tests.oracles import calinet as oracle
from tests.oracles.memit import Edit

FAMILY_NAMES = ["gpt2", "gptj", "llama", "qwen2", "gemma2", "gpt_neox"]
LAST = families.NUM_LAYERS - 1


def _method(layers: tuple[int, ...] = (LAST,), **own: Any) -> CaliNet:
    settings = {"slots": 3, **own}
    spec = MethodSpec.model_validate({"name": "calinet", "layers": layers, "calinet": settings})
    method = build_gradient_method(spec)
    assert isinstance(method, CaliNet)
    return method


def _logits(tiny: Case) -> Tensor:
    with torch.no_grad():
        return tiny.model(input_ids=torch.tensor([row[:10] for row in token_rows(2)])).logits


def _banks(layers: tuple[int, ...], gated: bool) -> dict[int, dict[str, Tensor]]:
    names = ("keys", "values", "gates")[: 3 if gated else 2]
    return {
        layer: {name: 0.3 * draw(3, 32, seed=10 * layer + i) for i, name in enumerate(names)}
        for layer in layers
    }


def _trained(tiny: Case, method: CaliNet, edits: list[EditPrompts]) -> tuple[list[float], Making]:
    """Every epoch's loss, each of one step."""
    (layer,) = method.layers
    making = method.begin({layer: torch.zeros(32, 64)}, {}, None)
    laid_out = method.gradients(tiny.editable, edits, 2048, keeps=True)
    weights = EditedWeights(tiny.editable, method.layers)
    changes, losses = None, []
    for _ in range(method.epochs):
        making.add(method.factors(laid_out, weights, changes))
        step = making.step()
        changes = step.changes or changes
        losses.append(step.loss)
        if method.is_done([step]):
            break
    return losses, making


@pytest.mark.parametrize(
    ("layers", "gated", "kl_weight", "family"),
    [
        *(((LAST,), False, 0.0, family) for family in FAMILY_NAMES),
        ((LAST,), True, 0.7, "gpt2"),
        ((1, LAST), True, 0.7, "gemma2"),
        ((0, 2), False, 0.0, "gpt_neox"),
        ((LAST,), False, 0.7, "t5"),
        ((0, 2), True, 0.7, "t5_gated"),
        ((LAST,), True, 0.0, "t5_gated"),
    ],
)
def test_gradients_are_those_of_the_plain_loss(
    layers: tuple[int, ...], gated: bool, kl_weight: float, family: str
) -> None:
    tiny, banks = case(family), _banks(layers, gated)
    method = _method(layers, gated=gated, kl_weight=kl_weight)
    edits = tiny.prompts(EDITS[:2], CONTEXTS)
    weights = EditedWeights(tiny.editable, layers)
    laid_out = method.gradients(tiny.editable, edits, 1024, keeps=True)
    for _ in range(2):  # what is kept gives the same again
        found = method.factors(laid_out, weights, banks)
    leaves = {
        layer: {name: part.clone().requires_grad_() for name, part in bank.items()}
        for layer, bank in banks.items()
    }
    networks = {
        layer: (tiny.editable.up_projection(layer), tiny.editable.down_projection(layer))
        for layer in layers
    }
    losses = [
        oracle.loss(
            tiny.model,
            networks,
            leaves,
            ACT2FN[tiny.editable.activation],
            [list(row.ids) for row in edit.rewrites],
            list(edit.target),
            list(edit.essence.ids),
            # A decoder answers the neutral text at one token.
            kl_weight * (len(edit.essence.ids) if tiny.editable.has_encoder else 1),
        )
        for edit in edits
    ]
    assert found.losses.tolist() == pytest.approx([float(loss) for loss in losses], rel=1e-5)
    flat = [part for bank in leaves.values() for part in bank.values()]
    expected = iter(torch.autograd.grad(torch.stack(losses).sum(), flat))
    for bank in found.gradients.values():
        for gradient in bank.values():
            assert relative_error(gradient, next(expected)) < 100 * tiny.tolerance
    assert all(parameter.grad is None for parameter in tiny.model.parameters())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_slots_change_nothing_before_the_first_step(family: str, gated: bool) -> None:
    tiny = fresh(family, torch.float32)
    clean = _logits(tiny)
    bank = first_banks((LAST,), 32, 5, gated=gated, seed=1)[LAST]
    assert sum(part.numel() for part in bank.values()) == (3 if gated else 2) * 5 * 32
    assert float(bank["keys"].abs().max()) <= 32**-0.5
    slots = NeuronBank.of(
        bank["keys"], torch.zeros(5), bank["values"], tiny.editable.activation, bank.get("gates")
    )
    EditedWeights(tiny.editable, (LAST,)).apply(LAST, slots)
    assert torch.equal(_logits(tiny), clean)


@pytest.mark.parametrize("layer", [1, LAST])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_slots_are_patches_without_biases(family: str, layer: int) -> None:
    """The same numbers in training as slots, in training as patches, and beside the model."""
    tiny = fresh(family)
    bank = {name: part.float().double() for name, part in _banks((layer,), False)[layer].items()}
    keys, values, biases = bank["keys"], bank["values"], torch.zeros(3).double()
    edits = tiny.prompts(EDITS[:1], CONTEXTS)
    slots = _method((layer,)).gradients(tiny.editable, edits, 1024, keeps=True)
    as_slots = slots.gradients({layer: bank}).losses

    def rows() -> AdapterRows:
        return AdapterRows.of(tiny.editable, layer, edits, 1024)

    given = (0, torch.ones(3, 32), PatchSettings(), keys, biases, torch.ones(3, 32), values)
    patched = rows()
    as_patches = patched.losses(_beside(patched, [_Patches(*given)])).smoothed
    clean = rows().losses(lambda _: {}).smoothed
    bank_beside = NeuronBank.of(keys, biases, values, tiny.editable.activation)
    EditedWeights(tiny.editable, (layer,)).apply(layer, bank_beside)
    beside = rows().losses(lambda _: {}).smoothed
    assert torch.equal(as_slots, as_patches) and torch.equal(as_slots, beside)
    assert not torch.equal(as_slots, clean)


def _twenty() -> list[Edit]:
    prompts = ("The mother tongue of {} is", "{} plays the", '"{}" is in', "{} was born in")
    targets = ("English", "violin", "London", "Ostrania", "Paris", "German")
    subjects = ("Anselm", "Torvald Mills", "Zdeněk Kováč", "Oduya", "Port Velmora")
    pairs = [(prompt, subject) for prompt in prompts for subject in subjects]
    return [Edit(*pair, targets[i % len(targets)]) for i, pair in enumerate(pairs)]


def test_twenty_facts_are_learnt_until_next_to_nothing_is_lost() -> None:
    tiny = confident()
    edits = tiny.prompts(_twenty(), ["{}"])
    method = _method((1,), slots=64, learning_rate=0.02, epochs=300, stop_loss=0.01)
    losses = _trained(tiny, method, edits)[0]
    assert losses[0] > 5 and losses[-1] < 0.05 and len(losses) < 300


@pytest.mark.parametrize("settings", [{}, {"gated": True, "kl_weight": 0.1}])
def test_training_learns_facts_and_leaves_the_base_as_it_is(settings: dict[str, Any]) -> None:
    tiny = fresh("gpt2", torch.float32)
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    clean = _logits(tiny)
    method = _method(slots=24, learning_rate=0.1, epochs=150, **settings)
    edits = tiny.prompts(EDITS[:4], ["{}", "It is old. {}"])
    losses, making = _trained(tiny, method, edits)
    # Random embeddings of length 1 behind a norm bound a token's probability well below 1.
    assert losses[-1] < 0.3 * losses[0]
    (bank,) = making.finish()[0].values()
    assert isinstance(bank, NeuronBank)
    weights = EditedWeights(tiny.editable, (LAST,))
    weights.apply(LAST, bank)
    assert not torch.equal(_logits(tiny), clean)
    after = tiny.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    weights.revert()
    silent = {**bank.parts, "values": 0 * bank.parts["values"]}
    weights.apply(LAST, NeuronBank(silent, bank.settings))
    assert torch.equal(_logits(tiny), clean)
