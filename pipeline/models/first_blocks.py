"""A model made of another one's embeddings, first blocks, final norm and unembedding."""

import copy
from typing import Any

from torch import nn
from transformers import AutoModelForTextEncoding, PreTrainedModel

from pipeline.errors import InputError
from pipeline.models.answers import is_encoder_decoder, num_encoder_blocks
from pipeline.models.answers import num_blocks as num_decoder_blocks
from pipeline.models.loading import auto_class


def first_blocks(model: PreTrainedModel, count: int | None = None) -> PreTrainedModel:
    """Copy a language model without its upper blocks; the copy's weights are its own.

    The final norm and the unembedding follow the last block that is left, so that the copy is a
    language model of the same architecture and vocabulary. Of an encoder-decoder model both halves
    lose their upper blocks.

    Args:
        model: a model of one of the families in `pipeline.models.anatomy`.
        count: blocks to keep, in each half; None keeps all.

    Raises:
        InputError: the model has fewer blocks.
    """
    config = shorter_config(model.config, count)
    return _copied(model, auto_class(config), config)


def first_encoder_blocks(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Copy the encoder of an encoder-decoder model without its upper blocks.

    Raises:
        InputError: it has fewer blocks.
    """
    return _copied(model, AutoModelForTextEncoding, shorter_encoder_config(model.config, count))


def shorter_config(config: Any, count: int | None) -> Any:
    """The configuration of `first_blocks`, with its arguments and errors."""
    shorter = copy.deepcopy(config)
    if count is None:
        return shorter
    _require(count, num_decoder_blocks(config), "")
    text_config = shorter.get_text_config()
    text_config.num_hidden_layers = count
    if is_encoder_decoder(config):
        _require(count, num_encoder_blocks(config), "an encoder of ")
        text_config.num_decoder_layers = count
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = list(text_config.layer_types)[:count]
    return shorter


def shorter_encoder_config(config: Any, count: int) -> Any:
    """The configuration of `first_encoder_blocks`, with its arguments and errors."""
    _require(count, num_encoder_blocks(config), "an encoder of ")
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = count
    return shorter


def _require(count: int, total: int, whose: str) -> None:
    if not 1 <= count <= total:
        raise InputError(f"cannot keep {count} blocks of a model that has {whose}{total}")


def _copied(model: PreTrainedModel, kind: Any, config: Any) -> PreTrainedModel:
    """A model of the same weights, as far as there is a place for them, and tied as they are.

    What a configuration says of tied weights is not what a checkpoint holds, of T5 for one.
    """
    shorter: PreTrainedModel = kind.from_config(config, dtype=model.dtype)
    trained = dict(shorter.named_parameters(remove_duplicate=False))
    wanted, once = shorter.state_dict().keys(), dict[int, nn.Parameter]()
    kept: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if name not in wanted:
            continue
        if name in trained and tensor.data_ptr() not in once:
            once[tensor.data_ptr()] = nn.Parameter(tensor.clone())
        kept[name] = once[tensor.data_ptr()] if name in trained else tensor.clone()
    shorter.load_state_dict(kept, assign=True)
    nn.Module.to(shorter, model.device)
    return shorter.eval()
