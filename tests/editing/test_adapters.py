"""Neurons beside a feed-forward network: what they add, and that everything else stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from pipeline import load_adapter
from pipeline.adapter_files import save_edited
from pipeline.editing.adapters import NeuronBank, make_adapter
from pipeline.editing.update import EditedWeights
from pipeline.errors import FingerprintMismatchError, InputError
from pipeline.models.editable import EditableModel
from pipeline.models.masks import plain_segments
from tests import families
from tests.cases import Case, draw, fresh, relative_error, token_rows
from tests.oracles.neurons import bank_output

FAMILY_NAMES = ["gpt2", "gptj", "gpt_neox", "opt", "llama", "qwen2", "gemma2", "phi3"]
LAST = families.NUM_LAYERS - 1


def _bank(
    model: EditableModel, count: int = 3, *, gated: bool = False, seed: int = 0
) -> NeuronBank:
    width = model.hidden_size
    return NeuronBank.of(
        0.3 * draw(count, width, seed=seed),
        0.1 * draw(count, seed=seed + 1),
        0.3 * draw(count, width, seed=seed + 2),
        model.activation,
        0.3 * draw(count, width, seed=seed + 3) if gated else None,
    )


def _own_bank(model: EditableModel, seed: int) -> NeuronBank:
    """Neurons of the form that the model's own have."""
    if not model.family.is_gated:
        return _bank(model, seed=seed)
    bank = _bank(model, gated=True, seed=seed)
    return replace(bank, parts={**bank.parts, "biases": torch.zeros(bank.num_neurons)})


def _logits(model: nn.Module, rows: int = 3) -> Tensor:
    ids = torch.tensor([row[:10] for row in token_rows(rows)])
    with torch.no_grad():
        return model(input_ids=ids).logits


def _state(case: Case) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in case.model.state_dict().items()}


def _is_as_before(case: Case, before: dict[str, Tensor]) -> bool:
    after = case.model.state_dict()
    same = before.keys() == after.keys()
    return same and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@contextmanager
def _ffn(case: Case, layer: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The inputs of a feed-forward network and what its down-projection puts out, by itself."""
    seen: list[tuple[Tensor, Tensor]] = []
    inputs: list[Tensor] = []
    editable = case.editable
    handles = [
        editable.up_projection(layer).register_forward_pre_hook(
            lambda _module, given: inputs.append(given[0])
        ),
        editable.down_projection(layer).register_forward_hook(
            lambda _module, _given, output: seen.append((inputs[-1], output))
        ),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_neurons_add_the_sum_of_their_values(family: str, gated: bool) -> None:
    case = fresh(family)
    bank, before = _bank(case.editable, gated=gated), _state(case)
    with _ffn(case, LAST) as plain:
        _logits(case.model)
    detach = bank.attach(case.editable, LAST)
    with _ffn(case, LAST) as patched:
        _logits(case.model)
    detach()
    (queries, output), (same_queries, with_bank) = plain[0], patched[0]
    assert torch.equal(queries, same_queries)
    activation = ACT2FN[case.editable.activation]
    expected = [bank_output(query, bank.parts, activation) for query in queries.flatten(0, -2)]
    added = (with_bank - output).flatten(0, -2)
    assert relative_error(added, torch.stack(expected)) < 1e-6
    assert _is_as_before(case, before)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_neurons_without_a_value_change_nothing(family: str) -> None:
    case = fresh(family, torch.float32)
    clean, bank = _logits(case.model), _bank(case.editable)
    parts = {**bank.parts, "values": torch.zeros_like(bank.parts["values"])}
    detach = NeuronBank(parts, bank.settings).attach(case.editable, LAST)
    assert torch.equal(_logits(case.model), clean)
    detach()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_only_the_read_positions_are_computed_and_they_are_the_same(family: str) -> None:
    """`EditableModel.final` with `read` lets the last MLP compute some tokens only."""
    case = fresh(family)
    EditedWeights(case.editable, (LAST,)).apply(LAST, _bank(case.editable))
    ids = torch.tensor([row[:10] for row in token_rows(2)])
    positions = torch.arange(10).expand_as(ids)
    masks = case.editable.masks(positions, plain_segments(torch.tensor([10, 10]), 10))
    given = {"first": 0, "masks": masks, "position_ids": positions, "input_ids": ids}
    with torch.no_grad():
        whole = case.editable.final(None, **given)
        read = torch.tensor([3, 9, 14])
        some = case.editable.final(None, **given, read=read)
    assert relative_error(some, whole.flatten(0, 1)[read]) < case.tolerance


def test_rounds_joined_are_one_bank() -> None:
    case = fresh("gpt2")
    first, second = _bank(case.editable, 2), _bank(case.editable, 3, seed=7)
    weights = EditedWeights(case.editable, (1, LAST))
    weights.apply(LAST, first)
    weights.apply(LAST, second)
    assert weights.version == 2
    ((layer, joined),) = weights.adapters
    assert layer == LAST and isinstance(joined, NeuronBank) and joined.num_neurons == 5
    by_one = _logits(case.model)
    weights.revert()
    detach = [first.attach(case.editable, LAST), second.attach(case.editable, LAST)]
    assert relative_error(_logits(case.model), by_one) < 1e-12
    for one in detach:
        one()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_applied_and_taken_out_as_updates_are(family: str, dtype: torch.dtype) -> None:
    case = fresh(family, dtype)
    before, clean = _state(case), _logits(case.model)
    weights = EditedWeights(case.editable, (1, LAST))
    bank, update = _bank(case.editable), (0.05 * draw(32, 64)).float()
    weights.apply(1, update)
    updated = _logits(case.model)
    weights.apply(LAST, bank)
    edited = _logits(case.model)
    assert weights.version == 2 and edited.dtype == dtype
    assert not torch.equal(updated, edited)
    assert weights.norms(LAST)[1] == pytest.approx(bank.norm())

    with weights.unedited():
        assert torch.equal(_logits(case.model), clean) and _is_as_before(case, before)
    assert torch.equal(_logits(case.model), edited)
    weights.lay_down()
    assert torch.equal(_logits(case.model), clean)
    weights.take_up()
    assert torch.equal(_logits(case.model), edited)
    with weights.tried({LAST: _bank(case.editable, 1, seed=9)}):
        assert not torch.equal(_logits(case.model), edited)
    assert torch.equal(_logits(case.model), edited) and weights.version == 2

    weights.revert()
    assert weights.version == 0 and _is_as_before(case, before)
    assert torch.equal(_logits(case.model), clean)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    case = fresh("gpt2")
    clean, weights = _logits(case.model), EditedWeights(case.editable, (LAST,))
    narrow = NeuronBank.of(draw(2, 31), draw(2), draw(2, 31), "relu")
    with pytest.raises(ValueError, match="layer 3: its neurons are 31 wide, the model 32"):
        weights.apply(LAST, narrow)
    with pytest.raises(ValueError, match="layer 0 is not among the edited ones"):
        weights.apply(0, _bank(case.editable))
    weights.apply(LAST, NeuronBank.of(draw(2, 32), draw(2), 0 * draw(2, 32), "relu"))
    with pytest.raises(ValueError, match="make no one bank"):
        weights.apply(LAST, _bank(case.editable))
    assert weights.version == 1 and torch.equal(_logits(case.model), clean)


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ({"keys": draw(2, 4)}, {"activation": "relu"}, "with the tensors keys"),
        ({"keys": draw(2, 4), "biases": draw(3), "values": draw(2, 4)}, {}, "do not fit"),
        ({"keys": draw(2, 4), "biases": draw(2), "values": draw(2, 5)}, {}, "do not fit"),
        ({"keys": draw(2), "biases": draw(2), "values": draw(2)}, {}, "do not fit"),
        ({"keys": draw(2, 4), "biases": draw(2), "values": draw(2, 4)}, {"activation": "x"}, "'x'"),
    ],
)
def test_tensors_that_are_no_neurons(
    parts: dict[str, Tensor], settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_adapter("neurons", parts, settings)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="unknown kind 'spell'; known: neurons"):
        make_adapter("spell", {}, {})


# --- beside a saved model -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_an_exported_adapter_loads_with_one_call(tmp_path: Path, family: str) -> None:
    case = fresh(family, torch.float32)
    weights = EditedWeights(case.editable, (1, LAST))
    clean = _logits(case.model)
    for layer in (1, LAST):
        weights.apply(layer, _bank(case.editable, seed=layer, gated=layer == 1))
    edited = _logits(case.model)
    save_edited(weights, case.tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(_logits(plain), clean)
    plain.lm_head.train()
    loaded = load_adapter(plain, tmp_path)
    assert plain.lm_head.training and all(part.requires_grad for part in plain.parameters())
    assert torch.equal(_logits(plain), edited)
    loaded.remove()
    loaded.remove()
    assert torch.equal(_logits(plain), clean)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    case = fresh("gpt2", torch.float32)
    weights = EditedWeights(case.editable, (LAST,))
    with pytest.raises(InputError, match="holds no adapter that can be read"):
        load_adapter(case.model, tmp_path)
    weights.apply(LAST, _bank(case.editable))
    save_edited(weights, case.tokenizer, tmp_path)
    with pytest.raises(FingerprintMismatchError, match="made for the model with fingerprint"):
        load_adapter(fresh("gptj", torch.float32).model, tmp_path)
    (tmp_path / "adapter.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter\.json is damaged"):
        load_adapter(case.model, tmp_path)


@pytest.mark.parametrize("layers", [(1,), (LAST,), (1, LAST)])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_merged_neurons_do_what_the_adapter_did(
    tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    case = fresh(family, torch.float64)
    weights = EditedWeights(case.editable, layers)
    for layer in layers:
        weights.apply(layer, _own_bank(case.editable, seed=layer))
    edited = _logits(case.model)
    weights.merge()
    assert weights.adapters == []
    assert relative_error(_logits(case.model), edited) < 1e-12
    save_edited(weights, case.tokenizer, tmp_path)
    assert not (tmp_path / "adapter.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert relative_error(_logits(plain), edited) < 1e-12
    assert EditableModel(plain).key_size(0) == families.INNER_SIZE + 3 * len(layers)


def test_what_cannot_be_merged_is_refused() -> None:
    case = fresh("llama")
    weights = EditedWeights(case.editable, (LAST,))
    with pytest.raises(InputError, match="no adapter to merge"):
        weights.merge()
    weights.apply(LAST, _bank(case.editable))
    edited = _logits(case.model)
    with pytest.raises(InputError, match=r"are plain, .* model type 'llama' gated: they cannot"):
        weights.merge()
    weights.revert()
    weights.apply(LAST, _bank(case.editable, gated=True))
    with pytest.raises(InputError, match="networks have no biases, the neurons do"):
        weights.merge()
    weights.revert()
    weights.apply(LAST, _bank(case.editable))
    assert torch.equal(_logits(case.model), edited)
    other = fresh("gpt2")
    weights = EditedWeights(other.editable, (LAST,))
    weights.apply(LAST, NeuronBank.of(draw(1, 32), draw(1), draw(1, 32), "relu"))
    with pytest.raises(InputError, match="the neurons' activation is 'relu', the model's 'gelu"):
        weights.merge()
