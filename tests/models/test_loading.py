"""Loading checkpoints safely, and telling one model's weights from another's."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from pipeline import factworld
from pipeline.errors import InputError
from pipeline.models.loading import (
    attention_implementation,
    display_name,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve_path,
)
from pipeline.spec import ModelSpec
from tests import families
from tests.cases import case, fresh

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint of the tiny GPT-2."""
    directory = tmp_path_factory.mktemp("gpt2")
    families.save("gpt2", directory)
    return directory


def _one_line(caught: pytest.ExceptionInfo[InputError]) -> str:
    message = str(caught.value)
    assert message.startswith("model.path: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_a_model_loads_in_the_wanted_dtype(saved: Path, name: str, dtype: torch.dtype) -> None:
    model = load_model(ModelSpec.model_validate({"path": str(saved), "dtype": name}), CPU)
    assert model.dtype == dtype
    assert not model.training
    expected = families.build("gpt2", dtype).state_dict()
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("stored", "loaded"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_auto_keeps_the_checkpoints_dtype_but_float16_on_a_processor(
    tmp_path: Path, stored: torch.dtype, loaded: torch.dtype
) -> None:
    checkpoint = families.build("gpt2", stored)
    checkpoint.save_pretrained(tmp_path)
    model = load_model(ModelSpec(path=str(tmp_path)), CPU)
    assert model.dtype == loaded
    weights = model.state_dict()
    assert all(torch.equal(weights[n], w.to(loaded)) for n, w in checkpoint.state_dict().items())


def test_the_tokenizer_loads(saved: Path) -> None:
    tokenizer = load_tokenizer(ModelSpec(path=str(saved)))
    text = families.SENTENCES[6]
    assert tokenizer(text)["input_ids"] == case("gpt2").tokenizer(text)["input_ids"]


def test_a_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    spec = ModelSpec(path=str(tmp_path / "absent"))
    for load in (load_config, load_tokenizer, lambda spec: load_model(spec, CPU)):
        with pytest.raises(InputError) as caught:
            load(spec)
        assert "absent" in _one_line(caught)


def test_a_directory_without_weights_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(InputError) as caught:
        load_model(ModelSpec(path=str(tmp_path)), CPU)
    assert "safetensors only" in _one_line(caught)


def test_pickled_weights_load_only_when_allowed(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    weights = families.build("gpt2", torch.float32).state_dict()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError) as caught:
        load_model(ModelSpec(path=str(tmp_path)), CPU)
    assert "safetensors only" in _one_line(caught)
    model = load_model(ModelSpec(path=str(tmp_path), allow_pickle=True), CPU)
    assert torch.equal(
        model.state_dict()["transformer.h.0.mlp.c_proj.weight"],
        weights["transformer.h.0.mlp.c_proj.weight"],
    )


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    """The module would leave a file behind when it is imported."""
    trace = tmp_path / "ran"
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(trace)!r}, 'w').close()\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n",
        encoding="utf-8",
    )
    with pytest.raises(InputError) as caught:
        load_config(ModelSpec(path=str(tmp_path)))
    _one_line(caught)
    assert not trace.exists()


def test_a_tokenizer_without_offsets_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    settings = {"tokenizer_class": "ByT5Tokenizer"}  # bytes, in Python only
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_tokenizer(ModelSpec(path=str(tmp_path)))
    assert "offsets" in _one_line(caught)


def test_a_damaged_config_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_config(ModelSpec(path=str(tmp_path)))
    _one_line(caught)


def test_damaged_weights_are_one_clear_line(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    whole = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError) as caught:
        load_model(ModelSpec(path=str(tmp_path)), CPU)
    _one_line(caught)


def test_soft_capped_attention_runs_eagerly() -> None:
    assert attention_implementation(case("gemma2").model.config) == "eager"
    for family in ("gpt2", "llama", "gemma3"):
        assert attention_implementation(case(family).model.config) is None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_is_that_of_the_checkpoint_in_any_dtype(
    family: str, dtype: torch.dtype
) -> None:
    assert fingerprint(fresh(family, dtype).model) == fingerprint(case(family).model)


def test_a_half_precision_checkpoint_has_one_fingerprint_in_wider_types() -> None:
    half = families.build("gpt2", torch.float16)
    wide = families.build("gpt2", torch.float32)
    wide.load_state_dict(half.state_dict())
    brain = families.build("gpt2", torch.bfloat16)
    brain.load_state_dict(half.state_dict())
    assert fingerprint(half) == fingerprint(wide) == fingerprint(brain)


def test_fingerprints_tell_models_apart(saved: Path) -> None:
    seen = {fingerprint(case(family).model) for family in families.FAMILIES}
    assert len(seen) == len(families.FAMILIES)
    model = load_model(ModelSpec(path=str(saved)), CPU)
    original = fingerprint(model)
    assert original == fingerprint(case("gpt2").model)
    weight = model.transformer.h[2].mlp.c_proj.weight
    with torch.no_grad():
        weight.mul_(1.001)  # less than half a step of bfloat16
    assert fingerprint(model) != original


def test_renamed_weights_have_another_fingerprint() -> None:
    one = families.build("llama", torch.float32)
    other = families.build("llama", torch.float32)
    other.model.layers[0].mlp.gate_proj, other.model.layers[0].mlp.up_proj = (
        other.model.layers[0].mlp.up_proj,
        other.model.layers[0].mlp.gate_proj,
    )
    assert fingerprint(one) != fingerprint(other)


def test_names() -> None:
    assert resolve_path("some/model") == "some/model"
    assert resolve_path("factworld") == str(factworld.model_path())
    assert display_name(ModelSpec(path="EleutherAI/gpt-j-6b")) == "gpt-j-6b"
    assert display_name(ModelSpec()) == "factworld"
    assert display_name(ModelSpec(path="/models/own/")) == "own"


def test_config_is_read_without_weights(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=7).save_pretrained(tmp_path)
    assert load_config(ModelSpec(path=str(tmp_path))).num_hidden_layers == 7
    GPT2Config(n_layer=5).save_pretrained(tmp_path)
    assert load_config(ModelSpec(path=str(tmp_path))).num_hidden_layers == 5
