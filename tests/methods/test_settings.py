"""Where a setting comes from when the spec leaves it null."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig, Gemma3Config, GPT2Config, PreTrainedConfig

from pipeline.editing.values import ValueSettings
from pipeline.errors import InputError
from pipeline.methods import CLOSED_FORM
from pipeline.methods import settings as module
from pipeline.methods.settings import EDITING_FILE, resolve_settings, value_settings
from pipeline.models.anatomy import FAMILIES
from pipeline.spec import JobSpec, parse_spec

TABLE = yaml.safe_load((Path(module.__file__).parent / "defaults.yaml").read_text(encoding="utf-8"))
XL = GPT2Config(n_layer=48, n_embd=1600, n_head=25)
SMALL = GPT2Config(n_layer=4, n_embd=32, n_head=4)
PAPER = {
    "steps": 25,
    "learning_rate": 0.5,
    "weight_decay": 0.5,
    "kl_weight": 0.0625,
    "clamp_norm": 0.75,
    "stop_loss": 0.05,
    "stop_when_predicted": False,
    "warm_start": False,
}


def _spec(**content: Any) -> JobSpec:
    return parse_spec(content, "test")


def _beside(directory: Path, content: Any) -> str:
    (directory / EDITING_FILE).write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(directory)


def _config(match: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(**match)


@pytest.mark.parametrize("entry", TABLE["models"], ids=lambda entry: entry["name"])
def test_every_published_entry_is_found_and_valid(entry: dict[str, Any]) -> None:
    assert set(entry) <= {"name", "source", "match", "method", "methods", "covariance"}
    assert entry["match"]["model_type"] in FAMILIES
    config = _config(entry["match"])
    resolved, source = resolve_settings(_spec(), config, "some/model")
    assert source == entry["source"] and source.strip()
    method = resolved.method
    assert method.layers == tuple(entry["method"]["layers"])
    assert method.covariance_weight == entry["method"]["covariance_weight"]
    value = method.value.model_dump(exclude={"loss_layer"})
    assert value == PAPER | entry["method"]["value"]
    assert value_settings(method) == ValueSettings(**value)
    assert resolved.covariance.samples == entry["covariance"]["samples"]
    # Nothing in the entry is misspelt: it is a valid part of a spec by itself.
    _spec(method=entry["method"], covariance=entry["covariance"])
    # Resolving again changes nothing.
    assert resolve_settings(resolved, config, "some/model")[0] == resolved


def test_no_two_entries_match_the_same_model() -> None:
    for entry in TABLE["models"]:
        config = _config(entry["match"])
        matching = [
            other["name"]
            for other in TABLE["models"]
            if all(getattr(config, name, None) == v for name, v in other["match"].items())
        ]
        assert matching == [entry["name"]]


def test_the_papers_value_search_is_the_last_resort() -> None:
    spec = _spec(method={"layers": [1, 2], "covariance_weight": 3})
    resolved, source = resolve_settings(spec, SMALL, "some/model")
    assert resolved.method.value.model_dump(exclude={"loss_layer"}) == PAPER
    assert source.startswith("the spec;") and "MEMIT" in source
    assert resolved.covariance.samples is None and resolved.covariance.corpus is None


def test_the_spec_comes_before_what_is_published() -> None:
    spec = _spec(
        method={"covariance_weight": 7, "value": {"steps": 3, "kl_weight": 0}},
        covariance={"samples": 11, "corpus": "own.txt"},
        seed=4,
    )
    resolved, source = resolve_settings(spec, XL, "gpt2-xl")
    assert source == "MEMIT code, gpt2-xl"
    assert resolved.method.layers == (13, 14, 15, 16, 17)
    assert resolved.method.covariance_weight == 7
    expected = PAPER | {"steps": 3, "kl_weight": 0.0}
    assert resolved.method.value.model_dump(exclude={"loss_layer"}) == expected
    assert (resolved.covariance.samples, resolved.covariance.corpus) == (11, "own.txt")
    assert resolved.seed == 4
    assert spec.method.layers is None  # the caller's spec stays


def test_a_file_beside_the_model_comes_before_the_table(tmp_path: Path) -> None:
    published = {
        "source": "its makers",
        "method": {
            "layers": [2],
            "covariance_weight": 9,
            "contexts": ["{}"],
            "value": {"steps": 4},
        },
        "covariance": {"corpus": "factworld", "samples": 5},
    }
    path = _beside(tmp_path, published)
    resolved, source = resolve_settings(_spec(), XL, path)
    assert source == f"{EDITING_FILE} beside the model: its makers"
    assert resolved.method.layers == (2,)
    assert resolved.method.contexts == ("{}",)
    assert resolved.method.value.steps == 4
    assert resolved.method.value.learning_rate == 0.5  # the paper's: the table is not consulted
    assert (resolved.covariance.corpus, resolved.covariance.samples) == ("factworld", 5)
    own = _spec(method={"layers": [0, 1]})
    assert resolve_settings(own, XL, path)[0].method.layers == (0, 1)


@pytest.mark.parametrize(
    "content",
    [
        ["layers"],
        {"method": {"layers": [3, 1], "covariance_weight": 1}},
        {"method": {"layers": "all", "covariance_weight": 1}},
        {"method": {"layers": [1], "covariance_weight": -1}},
        {"method": {"layers": [1], "covariance_weight": 1, "value": {"steps": 0}}},
        {"method": {"layers": [1], "covariance_weight": 1, "value": {"step": 5}}},
        {"method": {"layers": [1], "covariance_weight": 1, "lambda": 3}},
        {"method": {"layers": [1], "covariance_weight": 1}, "covariance": {"samples": 0}},
    ],
)
def test_a_wrong_file_beside_the_model_is_named(tmp_path: Path, content: Any) -> None:
    path = _beside(tmp_path, content)
    with pytest.raises(InputError, match=EDITING_FILE) as caught:
        resolve_settings(_spec(), SMALL, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{}, {"layers": [1]}, {"covariance_weight": 3}])
def test_an_unpublished_model_needs_its_settings(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"gpt2, 4 blocks of width 32") as caught:
        resolve_settings(_spec(method=given), SMALL, "some/model")
    assert "method.layers and method.covariance_weight" in str(caught.value)
    assert "some/model" in str(caught.value)


def test_a_layer_that_does_not_exist_is_named() -> None:
    spec = _spec(method={"layers": [1, 4], "covariance_weight": 1})
    with pytest.raises(InputError, match=r"method\.layers: 4 does not exist.*blocks 0 to 3"):
        resolve_settings(spec, SMALL, "some/model")
    last = _spec(method={"layers": [3], "covariance_weight": 1})
    assert resolve_settings(last, SMALL, "some/model")[0].method.layers == (3,)


def test_published_layers_must_exist_too(tmp_path: Path) -> None:
    path = _beside(tmp_path, {"method": {"layers": [4], "covariance_weight": 1}})
    with pytest.raises(InputError, match="4 does not exist"):
        resolve_settings(_spec(), SMALL, path)


def test_the_loss_is_read_from_the_last_block_only() -> None:
    def given(layer: int | None) -> JobSpec:
        method = {"layers": [1], "covariance_weight": 1, "value": {"loss_layer": layer}}
        return _spec(method=method)

    for layer in (None, 3):
        resolve_settings(given(layer), SMALL, "some/model")
    with pytest.raises(InputError, match=r"loss_layer: 2 is not the last block \(3\)"):
        resolve_settings(given(2), SMALL, "some/model")


def test_a_multimodal_model_is_matched_by_its_text_part() -> None:
    config = Gemma3Config(text_config={"num_hidden_layers": 5, "hidden_size": 32})
    spec = _spec(method={"layers": [4], "covariance_weight": 1})
    assert resolve_settings(spec, config, "some/model")[0].method.layers == (4,)
    with pytest.raises(InputError, match="5 blocks of width 32"):
        resolve_settings(_spec(), config, "some/model")


def test_other_methods_have_what_is_published_for_them() -> None:
    def resolved(name: str, **given: Any) -> Any:
        return resolve_settings(_spec(method={"name": name, **given}), XL, "gpt2-xl")[0].method

    assert resolved("rome").layers == (17,)
    assert (resolved("emmet").layers, resolved("emmet").covariance_weight) == ((17,), 1000)
    for name in ("memit_accumulated", "alphaedit"):
        assert resolved(name).layers == (13, 14, 15, 16, 17)
        assert resolved(name).value == resolved("memit").value
    assert resolved("emmet", layers=[3, 4], covariance_weight=5).layers == (3, 4)
    with pytest.raises(InputError, match=r"rome edits one layer, not \[3, 4\]"):
        resolved("rome", layers=[3, 4])


def test_rome_takes_the_last_of_the_layers_published_for_several(tmp_path: Path) -> None:
    path = _beside(tmp_path, {"method": {"layers": [1, 2], "covariance_weight": 9}})
    assert resolve_settings(_spec(method={"name": "rome"}), SMALL, path)[0].method.layers == (2,)


def test_only_methods_that_weigh_the_covariance_need_its_weight() -> None:
    for name in CLOSED_FORM:
        spec = _spec(method={"name": name, "layers": [1]})
        if name in ("alphaedit", "rome"):
            assert resolve_settings(spec, SMALL, "some/model")[0].method.layers == (1,)
            continue
        with pytest.raises(InputError, match=r"give method\.layers and method\.covariance_weight"):
            resolve_settings(spec, SMALL, "some/model")
    for name in ("alphaedit", "rome"):
        with pytest.raises(InputError, match=r"give method\.layers \("):
            resolve_settings(_spec(method={"name": name}), SMALL, "some/model")
