"""Load a language model and its tokenizer, and tell one model's weights from another's."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pipeline import factworld
from pipeline.errors import InputError
from pipeline.models.anatomy import family_named
from pipeline.models.answers import is_encoder_decoder
from pipeline.models.placement import place
from pipeline.spec import ModelSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLES_PER_TENSOR = 4096


def resolve_path(path: str) -> str:
    """Return what from_pretrained takes: `factworld` stands for the embedded model."""
    return str(factworld.model_path()) if path == "factworld" else path


def load_config(spec: ModelSpec) -> Any:
    """Read the model's configuration only.

    Raises:
        InputError: there is no such model, or it needs code that the spec does not allow.
        ModelNotSupportedError: its architecture is not covered.
    """
    config = load_encoder_config(spec)
    family_named(config.model_type)
    return config


def load_encoder_config(spec: ModelSpec) -> Any:
    """Read the configuration only of an encoder of texts, of whatever architecture.

    Raises:
        InputError: as of `load_config`.
    """
    with _loading(repr(spec.path)):
        config = AutoConfig.from_pretrained(
            resolve_path(spec.path),
            revision=spec.revision,
            trust_remote_code=False,
        )
    _refuse_kernels(config, spec)
    return config


def _refuse_kernels(config: Any, spec: ModelSpec) -> None:
    """Refuse a model that names an attention kernel on the hub: loading it would run that code."""
    for part in (config, config.get_text_config()):
        kernel = getattr(part, "_attn_implementation", None)
        if kernel is not None and "/" in str(kernel):
            raise InputError(
                f"model.path: {spec.path!r} asks for {kernel!r}, a kernel of its own, which would"
                " run its code; take attn_implementation out of its config.json"
            )


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, which must report character offsets.

    Raises:
        InputError: there is no tokenizer, or it is a slow one without offsets.
    """
    with _loading(f"the tokenizer of {spec.path!r}"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_path(spec.path),
            revision=spec.revision,
            trust_remote_code=False,
        )
        # A damaged one may load and fail at its first text.
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not tokenizer.is_fast:
        raise InputError(
            f"model.path: the tokenizer of {spec.path!r} gives no character offsets, which finding"
            " the subject's last token needs; convert it to a fast tokenizer (tokenizer.json)"
        )
    if not ids:
        # transformers makes an empty one where a directory has none.
        raise InputError(
            f"model.path: cannot load the tokenizer of {spec.path!r}: it has no vocabulary; put"
            " tokenizer.json beside the weights"
        )
    return tokenizer


def load_model(spec: ModelSpec, *devices: torch.device) -> PreTrainedModel:
    """Load the language model from safetensors onto a device, in the spec's dtype, for evaluation.

    `auto` is the checkpoint's dtype, but float32 for float16 on a processor. Over several devices
    it is spread as `pipeline.models.placement` says.

    Raises:
        InputError: weights are absent, or are pickled and the spec does not allow that; or the
            model cannot be spread over so many devices.
    """
    config = load_config(spec)
    transformers_logging.disable_progress_bar()
    hint = "" if spec.allow_pickle else " (weights load from safetensors only)"
    with _loading(f"{spec.path!r}{hint}"):
        result: Any = auto_class(config).from_pretrained(
            resolve_path(spec.path),
            revision=spec.revision,
            trust_remote_code=False,
            dtype=_DTYPES.get(spec.dtype, "auto"),
            use_safetensors=None if spec.allow_pickle else True,
            # Pickled weights are read by torch's own reader, which makes tensors and nothing else.
            weights_only=True,
            attn_implementation=attention_implementation(config),
            output_loading_info=True,
        )
    model: PreTrainedModel = result[0]
    missing = result[1]["missing_keys"]
    if missing:
        # transformers fills what is missing with random numbers.
        raise InputError(
            f"model.path: {spec.path!r} lacks {len(missing)} weights, among them"
            f" {min(missing)}; the checkpoint is not a whole language model"
        )
    if spec.dtype == "auto" and devices[0].type == "cpu" and model.dtype == torch.float16:
        model.float()  # processors compute float16 slowly, if at all
    place(model, devices)
    return model.eval()


def auto_class(config: Any) -> Any:
    """The class of transformers that makes a language model of this configuration."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def encoder_class(config: Any) -> Any:
    """The same of an encoder of texts; of an encoder-decoder model the encoder alone."""
    return AutoModelForTextEncoding if is_encoder_decoder(config) else AutoModel


def load_encoder(spec: ModelSpec, device: torch.device) -> PreTrainedModel:
    """Load an encoder of texts from safetensors onto a device, in evaluation mode.

    Raises:
        InputError: there is none.
    """
    transformers_logging.disable_progress_bar()
    kind = encoder_class(load_encoder_config(spec))
    with _loading(repr(spec.path)):
        model: PreTrainedModel = kind.from_pretrained(
            resolve_path(spec.path),
            revision=spec.revision,
            trust_remote_code=False,
            dtype=_DTYPES.get(spec.dtype, "auto"),
            use_safetensors=True,
        )
    nn.Module.to(model, device)
    return model.eval()


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path | str
) -> None:
    """Write model and tokenizer with save_pretrained.

    Raises:
        OSError: the disk is full or not writable.
    """
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:
        # safetensors and tokenizers have errors of their own for a full disk; tokenizers' is a
        # plain Exception.
        raise OSError(f"{directory}: {error}") from error


def attention_implementation(config: Any) -> str | None:
    """Name the attention kernel, None for the architecture's own choice.

    The fused kernels drop the soft cap of Gemma 2's attention, so that runs eagerly.
    """
    text_config = config.get_text_config()
    capped = getattr(text_config, "attn_logit_softcapping", None) is not None
    return "eager" if capped else None


def fingerprint(model: PreTrainedModel) -> str:
    """Identify a model's weights, in float32 and bfloat16 alike: a SHA-256 in hexadecimal.

    Every parameter contributes its name, shape and up to 4,096 evenly spaced entries rounded to
    bfloat16; an edited model has another fingerprint than the model it came from. Wider numbers
    loaded as float16 are rounded twice, and so not recognised.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        stride = max(1, -(-flat.numel() // _SAMPLES_PER_TENSOR))
        sample = flat[::stride].to(torch.bfloat16).cpu().view(torch.int16)
        digest.update(json.dumps([name, list(parameter.shape)]).encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def display_name(spec: ModelSpec) -> str:
    """The model's name for tables and cards: the last part of its path or hub id."""
    return spec.path if "/" not in spec.path else Path(spec.path).name


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Turn what transformers raises for a model's files into an `InputError`.

    Its exceptions have no base in common: a file from anyone can make it raise any.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"model.path: cannot load {what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
