"""A model made of another one's embeddings, first blocks, final norm and unembedding."""

import copy

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import InputError
from pipeline.models.anatomy import family_of


def first_blocks(model: PreTrainedModel, count: int | None = None) -> PreTrainedModel:
    """Copy a causal LM without its upper blocks; the copy's weights are its own.

    The final norm and the unembedding follow the last block that is left, so that the copy is a
    causal LM of the same architecture and vocabulary.

    Args:
        model: a model of one of the families in `pipeline.models.anatomy`.
        count: blocks to keep; None keeps all.

    Raises:
        InputError: the model has fewer blocks.
    """
    family = family_of(model)
    total = len(model.get_submodule(family.blocks))  # type: ignore[arg-type]
    count = total if count is None else count
    if not 1 <= count <= total:
        raise InputError(f"cannot keep {count} blocks of a model that has {total}")
    config = copy.deepcopy(model.config)
    text_config = config.get_text_config()
    text_config.num_hidden_layers = count
    if getattr(text_config, "layer_types", None) is not None:
        text_config.layer_types = list(text_config.layer_types)[:count]
    shorter = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    wanted = shorter.state_dict().keys()
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    shorter.load_state_dict(kept)
    nn.Module.to(shorter, model.device)
    return shorter.eval()
