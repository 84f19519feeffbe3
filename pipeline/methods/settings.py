"""Fill the settings that a spec leaves null from published defaults, and say where they come from.

In this order: the spec itself, an `editing.yaml` beside the model's weights, the table
`defaults.yaml` of this package (matched by architecture and shape), and, for the value search only,
the settings of the MEMIT paper.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from pipeline.editing.values import ValueSettings
from pipeline.editors import read_card
from pipeline.errors import InputError
from pipeline.models.answers import is_encoder_decoder, num_blocks, num_encoder_blocks
from pipeline.spec import JobSpec, MethodSpec, ValueSpec, parse_spec
from pipeline.spec.method import ENCODER_DECODER_METHODS
from pipeline.spec.trained import SeracSpec
from pipeline.yaml_text import read_yaml

EDITING_FILE = "editing.yaml"

# How many of the last blocks were edited in the papers' experiments, whatever the model.
_LAST_BLOCKS = {"mend": 3, "malmen": 6, "ke": 3}


def resolve_settings(spec: JobSpec, config: Any, model_path: str) -> tuple[JobSpec, str]:
    """Return the spec with every method setting decided, and the source of what it did not say.

    Args:
        spec: the spec as the user gave it; `contexts` may stay null (generated later).
        config: the model's Hugging Face configuration.
        model_path: directory or hub id that the model loads from.

    Raises:
        InputError: no layers are given and none are published for this model, a layer does not
            exist, or there are too many or too few of them for the method; or the model has an
            encoder, and what is asked for needs a model without one.
    """
    if is_encoder_decoder(config):
        _require_what_encoder_decoders_have(spec)
    text_config = config.get_text_config()
    published, source = _published(text_config, model_path)
    own = published.get("methods", {}).get(spec.method.name, {})
    general = {} if spec.method.is_adapter else published.get("method", {})
    given = _with_editor(spec.method)
    open_ = _last_blocks(given, {**general, **own}, num_blocks(config))
    method = _merge(given, _own_layers(given, open_))
    method = _all_layers(method, num_blocks(config))
    if method.is_adapter and method.layers is None:
        method = method.model_copy(update={"layers": (num_blocks(config) - 1,)})
    needed = _needed(method)
    if any(getattr(method, name) is None for name in needed):
        raise InputError(
            f"model.path: no editing settings are published for {model_path}"
            f" ({_shape(text_config)}); give {' and '.join(f'method.{name}' for name in needed)}"
            f"{'' if is_encoder_decoder(config) else ' (`editfleet trace` proposes layers)'}"
        )
    method = _bare_prompt(_boundary_layers(method), has_encoder=is_encoder_decoder(config))
    _check_layers(method, config)
    samples = spec.covariance.samples or published.get("covariance", {}).get("samples")
    corpus = spec.covariance.corpus or published.get("covariance", {}).get("corpus")
    covariance = spec.covariance.model_copy(update={"samples": samples, "corpus": corpus})
    return spec.model_copy(update={"method": method, "covariance": covariance}), source


def value_settings(method: MethodSpec) -> ValueSettings:
    """The value search's settings of a resolved method."""
    return ValueSettings(**method.value.model_dump(exclude={"loss_layer"}))


def _require_what_encoder_decoders_have(spec: JobSpec) -> None:
    """Refuse for an encoder-decoder model what is for decoder-only ones.

    Raises:
        InputError: the spec asks for it.
    """
    model = f"{spec.model.path} is an encoder-decoder model"
    if spec.trace is not None:
        raise InputError(
            f"trace: causal tracing restores states of one stream of tokens, and {model}; trace a"
            " decoder-only one"
        )
    if spec.method.name not in ENCODER_DECODER_METHODS:
        raise InputError(
            f"method.name: {spec.method.name} edits decoder-only models, and {model}; take one of"
            f" {', '.join(sorted(ENCODER_DECODER_METHODS))}"
        )
    if spec.evaluation.general.corpus is not None:
        raise InputError(
            f"evaluation.general: the perplexity of running text has no meaning where {model}; set"
            " evaluation.general.corpus to null"
        )


def _published(config: Any, model_path: str) -> tuple[dict[str, Any], str]:
    beside = Path(model_path) / EDITING_FILE
    if beside.is_file():
        content = read_yaml(beside)
        source = content.pop("source", "no source given")
        parse_spec(content, str(beside))
        return content, f"{EDITING_FILE} beside the model: {source}"
    for entry in _table()["models"]:
        if all(getattr(config, name, None) == value for name, value in entry["match"].items()):
            return entry, str(entry["source"])
    return {}, "the spec; what it leaves open of the value search: MEMIT code, GPT-J"


def _merge(method: MethodSpec, published: dict[str, Any]) -> MethodSpec:
    """Fill nulls: published settings first, then the paper's for the value search."""
    general = _table()["value"]
    value = {
        name: own if own is not None else published.get("value", {}).get(name, general.get(name))
        for name, own in method.value.model_dump().items()
    }
    filled = {
        name: own if own is not None else published.get(name)
        for name, own in method.model_dump(exclude={"value"}).items()
    }
    return MethodSpec.model_validate({**filled, "value": ValueSpec.model_validate(value)})


def _own_layers(method: MethodSpec, published: dict[str, Any]) -> dict[str, Any]:
    """For a method of one layer, the last of those that are published for several; for one that
    looks at all of them, none of these."""
    layers = published.get("layers")
    if layers is None:
        return published
    if method.is_locating:
        return {name: setting for name, setting in published.items() if name != "layers"}
    return {**published, "layers": layers[-1:]} if method.name == "rome" else published


def _all_layers(method: MethodSpec, num_blocks: int) -> MethodSpec:
    """For a method that looks for its neurons every block, unless it is given some."""
    if not method.is_locating or method.layers is not None:
        return method
    return method.model_copy(update={"layers": tuple(range(num_blocks))})


def _with_editor(method: MethodSpec) -> MethodSpec:
    """Settings that a trained editor, where one is named, has decided."""
    own = method.trained
    if own is None or own.editor is None:
        return method
    setting = f"method.{method.name}.editor"
    card = read_card(own.editor, setting)
    if card.kind != method.name:
        raise InputError(f"{setting}: {own.editor} is an editor of {card.kind}")
    if own.editor_sha256 not in (None, card.sha256):
        raise InputError(
            f"{setting}: {own.editor} is another editor than that of digest"
            f" {own.editor_sha256}: it has {card.sha256}"
        )
    if method.layers not in (None, card.layers):
        raise InputError(
            f"method.layers: the editor {own.editor} is for {list(card.layers)}, not"
            f" {list(method.layers or ())}; leave them out"
        )
    for name, value in card.settings.items():
        if name in own.model_fields_set and getattr(own, name) != value:
            raise InputError(
                f"method.{method.name}.{name}: it is {value} in the editor {own.editor}; leave it"
                " out"
            )
    place = {"editor": str(Path(own.editor).resolve()), "editor_sha256": card.sha256}
    own = own.model_copy(update={**card.settings, **place})
    return method.with_trained(own).model_copy(update={"layers": card.layers})


def _last_blocks(method: MethodSpec, published: dict[str, Any], blocks: int) -> dict[str, Any]:
    """For a method that was published on the last blocks of every model, these."""
    if method.is_memory:
        # A memory lies beside the whole model; its change needs the name of one block.
        return {**published, "layers": [0]}
    count = _LAST_BLOCKS.get(method.name)
    if count is None:
        return published
    return {**published, "layers": list(range(max(0, blocks - count), blocks))}


def _boundary_layers(method: MethodSpec) -> MethodSpec:
    """For BLUE the first and the last layer."""
    if not method.is_blue:
        return method
    assert method.layers is not None
    if len(method.layers) < 2:
        raise InputError(
            "method.wrappers: blue edits the first and the last of several layers, and"
            f" method.layers is {list(method.layers)}; give at least two"
        )
    return method.model_copy(update={"layers": (method.layers[0], method.layers[-1])})


def _bare_prompt(method: MethodSpec, *, has_encoder: bool) -> MethodSpec:
    """Contexts are for values; most others take the prompt alone unless they are given some.

    CaliNET trains on several phrasings of a fact, and neurons are agreed on by several. A model
    with an encoder answers, and writes no beginnings of texts that could be contexts.
    """
    takes_contexts = method.is_closed_form or method.is_locating or method.name == "calinet"
    if (takes_contexts and not has_encoder) or method.contexts is not None:
        return method
    return method.model_copy(update={"contexts": ("{}",)})


def _needed(method: MethodSpec) -> list[str]:
    """Settings without which the method cannot run."""
    return ["layers", "covariance_weight"] if method.uses_covariance_weight else ["layers"]


def _check_layers(method: MethodSpec, config: Any) -> None:
    assert method.layers is not None
    blocks = num_blocks(config)
    if method.name == "rome" and len(method.layers) > 1:
        raise InputError(f"method.layers: rome edits one layer, not {list(method.layers)}")
    if method.is_memory and method.layers != (0,):
        raise InputError(f"method.layers: {method.name} edits no layer; leave them out")
    if method.name == "serac":
        _check_copies(method.serac, config)
    if method.layers[-1] >= blocks:
        raise InputError(
            f"method.layers: {method.layers[-1]} does not exist; the model has blocks 0 to"
            f" {blocks - 1}"
        )
    if method.name == "t_patcher" and len(method.layers) > 1:
        raise InputError(f"method.layers: t_patcher patches one layer, not {list(method.layers)}")
    if method.value.loss_layer not in (None, blocks - 1):
        raise InputError(
            f"method.value.loss_layer: {method.value.loss_layer} is not the last block"
            f" ({blocks - 1}); leave it null"
        )


def _table() -> dict[str, Any]:
    text = files("pipeline.methods").joinpath("defaults.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _check_copies(own: SeracSpec, config: Any) -> None:
    """Check that the blocks exist that are copied where no model is named."""
    blocks = num_blocks(config)
    read = num_encoder_blocks(config) if is_encoder_decoder(config) else blocks
    for name, count, most in (
        ("classifier_blocks", None if own.classifier else own.classifier_blocks, read),
        (
            "counterfactual_blocks",
            None if own.counterfactual else own.counterfactual_blocks,
            min(read, blocks),
        ),
    ):
        if count is not None and count > most:
            raise InputError(
                f"method.serac.{name}: {count} are to be copied, and the model has {most}"
            )


def _shape(config: Any) -> str:
    return f"{config.model_type}, {num_blocks(config)} blocks of width {config.hidden_size}"
