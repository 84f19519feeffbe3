"""Edited weights are the pristine ones plus the sum of updates, and undoing is exact."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from pipeline.editing.update import EditedWeights, Update
from pipeline.models.editable import EditableModel
from tests.cases import draw, fresh, relative_error

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _bits(model: EditableModel) -> dict[str, Tensor]:
    weights = model.model.state_dict().items()
    return {name: weight.clone().view(_BITS[weight.element_size()]) for name, weight in weights}


def _changed(model: EditableModel, before: dict[str, Tensor]) -> set[str]:
    after = _bits(model)
    return {name for name, bits in before.items() if not torch.equal(bits, after[name])}


def _updates(count: int, size: float = 0.05) -> list[Tensor]:
    return [(size * draw(32, 64, seed=seed)).float() for seed in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_weights_are_pristine_plus_updates_and_undo_gives_the_bits_back(
    family: str, dtype: torch.dtype
) -> None:
    editable = fresh(family, dtype).editable
    before = _bits(editable)
    pristine = editable.oriented_weight(1).clone()
    weights = EditedWeights(editable, (1, 2))
    updates = _updates(4)
    for update in updates[:3]:
        weights.apply(1, update)
    weights.apply(2, updates[3])
    assert weights.version == 4
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    total = updates[0].to(wide) + updates[1].to(wide) + updates[2].to(wide)
    assert torch.equal(editable.oriented_weight(1), (pristine.to(wide) + total).to(dtype))
    assert editable.oriented_weight(1).dtype == dtype
    assert _changed(editable, before) == {editable.weight_name(1), editable.weight_name(2)}

    weights.revert()
    assert weights.version == 0
    assert _changed(editable, before) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_too_small_for_the_dtype_add_up(dtype: torch.dtype) -> None:
    editable = fresh("gpt2", dtype).editable
    pristine = editable.oriented_weight(0).clone()
    step = pristine.float() * 2.0**-13  # far below half a step of either type
    weights = EditedWeights(editable, (0,))
    weights.apply(0, step)
    assert torch.equal(editable.oriented_weight(0), pristine)
    for _ in range(255):
        weights.apply(0, step)
    expected = (pristine.float() * (1 + 256 * 2.0**-13)).to(dtype)
    assert torch.equal(editable.oriented_weight(0), expected)
    assert not torch.equal(expected, pristine)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replayed_updates_give_the_same_bits(dtype: torch.dtype) -> None:
    editable = fresh("llama", dtype).editable
    weights = EditedWeights(editable, (0, 1))
    sequence = list(zip([0, 1, 0, 0, 1], _updates(5), strict=True))
    for layer, update in sequence:
        weights.apply(layer, update)
    first = _bits(editable)
    weights.revert()
    for layer, update in sequence:
        weights.apply(layer, update)
    assert _changed(editable, first) == set()
    # On a model loaded afresh, as a restarted worker has it, and in another order of the layers.
    other = fresh("llama", dtype).editable
    replayed = EditedWeights(other, (1, 0))
    for layer, update in sorted(sequence, key=lambda pair: -pair[0]):
        replayed.apply(layer, update)
    assert _changed(other, first) == set()


def test_the_model_computes_with_the_edited_weight() -> None:
    """A square weight of a module that stores it transposed: only the orientation tells."""
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, n_inner=8, vocab_size=20, n_positions=8)
    editable = EditableModel(AutoModelForCausalLM.from_config(config))
    conv = editable.model.transformer.h[1].mlp.c_proj
    key, update = torch.randn(8), torch.randn(8, 8)
    with torch.no_grad():
        clean = conv(key[None])[0]
        EditedWeights(editable, (1,)).apply(1, update)
        assert torch.allclose(conv(key[None])[0] - clean, update @ key, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 32), (32, 63), (32,), (1, 64), (32, 1)])
def test_another_shape_is_refused_and_changes_nothing(shape: tuple[int, ...]) -> None:
    """A transposed Conv1D's own shape (64, 32) too, and what would broadcast."""
    editable = fresh("gpt2").editable
    before = _bits(editable)
    weights = EditedWeights(editable, (1,))
    with pytest.raises(ValueError, match="layer 1: the update is") as caught:
        weights.apply(1, torch.ones(shape))
    assert "(32, 64)" in str(caught.value)
    assert weights.version == 0
    assert _changed(editable, before) == set()


def test_a_layer_that_was_not_announced_is_refused() -> None:
    editable = fresh("gpt2").editable
    before = _bits(editable)
    weights = EditedWeights(editable, (1, 2))
    with pytest.raises(ValueError, match=r"layer 0 is not among the edited ones \[1, 2\]"):
        weights.apply(0, torch.zeros(32, 64))
    assert weights.version == 0
    assert _changed(editable, before) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_callers_update_stays_the_callers(dtype: torch.dtype) -> None:
    editable = fresh("llama", dtype).editable
    pristine = editable.oriented_weight(1).clone()
    weights = EditedWeights(editable, (1,))
    update = torch.ones(32, 64, dtype=dtype)
    weights.apply(1, update)
    update.fill_(100.0)
    weights.apply(1, torch.ones(64, 32, dtype=dtype).T)  # any strides
    assert torch.equal(editable.oriented_weight(1), pristine + 2)
    assert torch.equal(update, torch.full((32, 64), 100.0, dtype=dtype))


# --- the form in which an update travels --------------------------------------------------------


def test_an_update_is_kept_in_its_smaller_form() -> None:
    def parts(rank: int) -> dict[str, tuple[int, ...]]:
        update = Update.of(draw(32, rank), draw(rank, 64, seed=1), ridge=0.5)
        assert update.ridge == 0.5
        return {name: tuple(part.shape) for name, part in update.parts.items()}

    assert parts(3) == {"left": (32, 3), "right": (3, 64)}
    assert parts(21) == {"left": (32, 21), "right": (21, 64)}  # 2,016 numbers against 2,048
    assert parts(22) == {"dense": (32, 64)}
    assert parts(100) == {"dense": (32, 64)}


@pytest.mark.parametrize("rank", [3, 40])
def test_an_updates_matrix_is_the_product(rank: int) -> None:
    left, right = draw(32, rank), draw(rank, 64, seed=1)
    update = Update.of(left, right)
    matrix = update.matrix()
    assert all(part.dtype == torch.float32 for part in update.parts.values())
    assert matrix.dtype == torch.float32 and matrix.shape == (32, 64)
    assert relative_error(matrix, left @ right) < 1e-6
    assert update.norm() == pytest.approx(float((left @ right).norm()), rel=1e-6)
    dense = Update.of(left @ right, ridge=2.0)
    assert dense.ridge == 2.0 and list(dense.parts) == ["dense"]
    assert torch.equal(dense.matrix(), (left @ right).float())
