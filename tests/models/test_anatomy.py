"""The table of architectures, and what is said of a model that does not fit it."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config
from transformers.pytorch_utils import Conv1D

from pipeline.errors import InputError, ModelNotSupportedError
from pipeline.models.anatomy import FAMILIES, family_of, is_transposed
from pipeline.models.editable import EditableModel
from tests import encoder_decoders
from tests.cases import ALL_FAMILIES, case, fresh


def test_every_row_of_the_table_has_a_tiny_model() -> None:
    decoders = {case(family).model.config.model_type for family in ALL_FAMILIES}
    encoders = {encoder_decoders.case(kind).config.model_type for kind in encoder_decoders.KINDS}
    assert decoders | encoders == set(FAMILIES)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_table_points_at_the_modules_that_compute(family: str) -> None:
    """Blocks, attention, MLP and down-projection are where the tests' own table has them."""
    tiny = case(family)
    editable = tiny.editable
    assert editable.blocks == tiny.blocks
    assert editable.num_blocks == 4
    for layer, down in enumerate(tiny.down_projections):
        assert editable.down_projection(layer) is down
        assert editable.key_size(layer) == 64
        name = editable.weight_name(layer)
        assert tiny.model.state_dict()[name].data_ptr() == down.get_parameter("weight").data_ptr()
        mlp = editable.mlp(layer)
        assert mlp is None if family == "opt" else down in list(mlp.modules())
        assert any(module is editable.attention(layer) for module in tiny.blocks[layer].modules())
    assert editable.hidden_size == 32
    assert editable.vocab_size == 400
    assert editable.max_positions == 128
    assert editable.dtype == torch.float64


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_oriented_weight_maps_keys_to_outputs(family: str) -> None:
    tiny = case(family)
    down = tiny.down_projections[2]
    key = torch.linspace(-1, 1, 64, dtype=torch.float64)
    bias = getattr(down, "bias", None)
    with torch.no_grad():
        expected = down(key[None])[0] - (0 if bias is None else bias)
    oriented = tiny.editable.oriented_weight(2)
    assert oriented.shape == (32, 64)
    assert oriented.data_ptr() == down.get_parameter("weight").data_ptr()
    assert torch.allclose(oriented @ key, expected, rtol=0, atol=1e-12)


def test_a_square_weight_is_oriented_by_its_modules_type() -> None:
    """With inner size = hidden size the shape says nothing."""
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_inner=8, vocab_size=20, n_positions=8)
    model = AutoModelForCausalLM.from_config(config)
    conv = model.transformer.h[0].mlp.c_proj
    assert conv.weight.shape == (8, 8)
    assert isinstance(conv, Conv1D) and is_transposed(conv)
    editable = EditableModel(model)
    key = torch.randn(8)
    with torch.no_grad():
        assert torch.allclose(editable.oriented_weight(0) @ key + conv.bias, conv(key[None])[0])

    linear = nn.Linear(8, 8)
    assert not is_transposed(linear)
    model.transformer.h[0].mlp.c_proj = linear
    editable = EditableModel(model)
    with torch.no_grad():
        assert torch.allclose(editable.oriented_weight(0) @ key + linear.bias, linear(key))


def test_an_unknown_architecture_is_named() -> None:
    config = BloomConfig(hidden_size=8, n_layer=1, n_head=2, vocab_size=20)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelNotSupportedError, match="'bloom' is not supported") as caught:
        EditableModel(model)
    assert isinstance(caught.value, InputError)
    assert all(name in str(caught.value) for name in FAMILIES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path", ["transformer", "transformer.h", "transformer.h.0.attn", "transformer.h.0.mlp.c_proj"]
)
def test_a_missing_module_is_named(path: str) -> None:
    model = fresh("gpt2").model
    parent, _, leaf = path.rpartition(".")
    delattr(model.get_submodule(parent), leaf)
    with pytest.raises(ModelNotSupportedError, match=r"'gpt2'.*missing") as caught:
        family_of(model)
    assert leaf in str(caught.value)


def test_a_model_without_blocks_is_refused() -> None:
    model = fresh("gpt2").model
    model.transformer.h = nn.ModuleList()
    with pytest.raises(ModelNotSupportedError, match="gpt2"):
        family_of(model)


def test_a_weight_that_is_not_plain_is_refused() -> None:
    model = fresh("llama").model
    model.model.layers[0].mlp.down_proj = nn.Identity()
    with pytest.raises(ModelNotSupportedError, match=r"down_proj is a Identity.*Linear or Conv1D"):
        family_of(model)
