"""Where blocks, MLP down-projection, attention and final norm sit in each architecture.

One row a family, keyed by the `model_type` of its Hugging Face configuration. A new architecture is
one more row here and one more entry in the tests' table of tiny models.
"""

from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ModelNotSupportedError


@dataclass(frozen=True)
class Family:
    """Module paths of one architecture.

    Attributes:
        base: path from the causal LM to the module whose forward runs blocks and final norm.
        blocks: path from the causal LM to the list of decoder blocks.
        attention: path inside a block to its self-attention.
        down_projection: path inside a block to its MLP's last linear map, whose input is the key.
        mlp: path inside a block to the module around the down-projection, None if there is none.
        up_projection: path inside a block to the linear map that reads the MLP's input; the gate's
            where there are two, or both one above the other.
        is_gated: the MLP multiplies two maps of its input.
        gated_projection: path inside a block to the map that the gate is multiplied by, None if
            there is none or it is in one with the gate.
        masks_by_layer_type: the base takes a dict of 4D masks, one a layer type, not one mask.
        encoder: path to the stack that reads the prompt; None in a decoder-only model. The paths
            above are then the decoder's.
        cross_attention: path inside a decoder block to the attention to what the encoder puts out.
    """

    base: str
    blocks: str
    attention: str
    down_projection: str
    mlp: str | None
    up_projection: str
    is_gated: bool = False
    gated_projection: str | None = None
    masks_by_layer_type: bool = False
    encoder: str | None = None
    cross_attention: str | None = None


_LLAMA = Family(
    "model",
    "model.layers",
    "self_attn",
    "mlp.down_proj",
    "mlp",
    "mlp.gate_proj",
    is_gated=True,
    gated_projection="mlp.up_proj",
)
_QWEN = replace(_LLAMA, masks_by_layer_type=True)

FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer", "transformer.h", "attn", "mlp.c_proj", "mlp", "mlp.c_fc"),
    "gptj": Family("transformer", "transformer.h", "attn", "mlp.fc_out", "mlp", "mlp.fc_in"),
    "gpt_neox": Family(
        "gpt_neox",
        "gpt_neox.layers",
        "attention",
        "mlp.dense_4h_to_h",
        "mlp",
        "mlp.dense_h_to_4h",
    ),
    "opt": Family("model", "model.decoder.layers", "self_attn", "fc2", None, "fc1"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": replace(_LLAMA, up_projection="mlp.gate_up_proj", gated_projection=None),
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "gemma2": _QWEN,
    "gemma3_text": _QWEN,
    "gemma3": replace(_QWEN, base="model.language_model", blocks="model.language_model.layers"),
    "t5": Family(
        "decoder",
        "decoder.block",
        "layer.0.SelfAttention",
        "layer.2.DenseReluDense.wo",
        "layer.2.DenseReluDense",
        "layer.2.DenseReluDense.wi",
        encoder="encoder",
        cross_attention="layer.1.EncDecAttention",
    ),
}

_GATED = {
    "t5": replace(
        FAMILIES["t5"],
        up_projection="layer.2.DenseReluDense.wi_0",
        is_gated=True,
        gated_projection="layer.2.DenseReluDense.wi_1",
    ),
}
"""Of model types that have both, the form whose configuration says `is_gated_act`."""


def family_named(model_type: str) -> Family:
    """Return the table row of an architecture.

    Raises:
        ModelNotSupportedError: there is none.
    """
    if model_type not in FAMILIES:
        raise ModelNotSupportedError(
            f"model type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
            " (a new one is one row in pipeline/models/anatomy.py)"
        )
    return FAMILIES[model_type]


def family_of(model: PreTrainedModel) -> Family:
    """Return the table row for a model, after checking that every module named there exists.

    Raises:
        ModelNotSupportedError: the architecture is not in the table, or the model's modules are not
            where the table says.
    """
    model_type = model.config.model_type
    family = family_named(model_type)
    if getattr(model.config, "is_gated_act", False):
        family = _GATED.get(model_type, family)
    try:
        block = model.get_submodule(family.blocks)[0]  # type: ignore[index]
        model.get_submodule(family.base)
        model.get_submodule(family.encoder or family.base)
        block.get_submodule(family.attention)
        block.get_submodule(family.up_projection)
        block.get_submodule(family.cross_attention or family.attention)
        down_projection = block.get_submodule(family.down_projection)
    except (AttributeError, IndexError) as error:
        raise ModelNotSupportedError(
            f"model type {model_type!r}: expected modules are missing ({error}); the table in"
            " pipeline/models/anatomy.py does not fit this version of the architecture"
        ) from error
    if not isinstance(down_projection, nn.Linear | Conv1D):
        raise ModelNotSupportedError(
            f"model type {model_type!r}: {family.down_projection} is a"
            f" {type(down_projection).__name__}, expected Linear or Conv1D with plain weights"
            " (quantised weights cannot be edited)"
        )
    return family


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a linear module stores its weight as (in, out): by type, never by shape."""
    return isinstance(module, Conv1D)
