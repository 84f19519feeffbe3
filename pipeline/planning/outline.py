"""A model's shapes without its weights: built from the configuration, on torch's `meta` device."""

from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.models.answers import is_encoder_decoder
from pipeline.models.editable import EditableModel
from pipeline.models.encoder_decoder import EncoderDecoderModel
from pipeline.models.loading import auto_class, load_config
from pipeline.spec import ModelSpec


class ModelOutline(EditableModel):
    """A model that can be counted but not run."""

    @property
    def num_parameters(self) -> int:
        """Entries of all weights; tied ones count once."""
        return sum(weight.numel() for weight in self.model.parameters())

    def _blocks_return_tuples(self) -> bool:
        return False


class EncoderDecoderOutline(ModelOutline, EncoderDecoderModel):
    """The same of a model with an encoder."""


def outline(spec: ModelSpec, *, device: torch.device) -> ModelOutline:
    """Build a model's outline in the type that it will compute in on a device.

    Raises:
        InputError: as of `load_config`.
        ModelNotSupportedError: the architecture is not covered.
    """
    config = load_config(spec)
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config)
    return as_outline(model.to(computing_type(spec, config, device)))


def as_outline(model: PreTrainedModel) -> ModelOutline:
    """The outline of a model on the `meta` device.

    Raises:
        ModelNotSupportedError: the architecture is not covered.
    """
    is_both = is_encoder_decoder(model.config)
    return (EncoderDecoderOutline if is_both else ModelOutline)(model)


def computing_type(spec: ModelSpec, config: Any, device: torch.device) -> torch.dtype:
    """The type of the weights while computing, as `pipeline.models.loading.load_model` has it."""
    if spec.dtype != "auto":
        found: torch.dtype = getattr(torch, spec.dtype)
        return found
    stored = getattr(config.get_text_config(), "dtype", None) or torch.float32
    dtype: torch.dtype = getattr(torch, stored) if isinstance(stored, str) else stored
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype
