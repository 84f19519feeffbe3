"""Adapters beside a saved model: written by `editfleet export`, loaded with one call.

`adapter.safetensors` holds their tensors as `<layer>.<kind>.<part>`, `adapter.json` the rest.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.editing.adapters import Adapter
from pipeline.editing.update import EditedWeights
from pipeline.errors import FingerprintMismatchError, InputError
from pipeline.models.encoder_decoder import editable_model
from pipeline.models.loading import fingerprint, save_model
from pipeline.models.modes import keeping_modes
from pipeline.results.damage import first_problem
from pipeline.results.pieces import DescribedAdapter, describe, named_tensors, undescribe

TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
_FORMAT = 1


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=_FORMAT, le=_FORMAT)]
    fingerprint: str
    adapters: list[DescribedAdapter]


@dataclass(frozen=True)
class LoadedAdapter:
    """Adapters that are beside a model; `remove` takes them off."""

    model: PreTrainedModel
    adapters: tuple[tuple[int, Adapter], ...]
    _detach: list[Callable[[], None]]

    def remove(self) -> None:
        """Leave the model as it was before; again changes nothing."""
        while self._detach:
            self._detach.pop()()


def save_edited(
    weights: EditedWeights, tokenizer: PreTrainedTokenizerBase, directory: Path | str
) -> None:
    """Write an edited model and its tokenizer with save_pretrained, and adapters beside it.

    Raises:
        OSError: the disk is full or not writable.
    """
    model = weights.model.model
    save_model(model, tokenizer, directory)
    if weights.adapters:
        _save(model, weights.adapters, Path(directory))


def _save(model: PreTrainedModel, adapters: Sequence[tuple[int, Adapter]], directory: Path) -> None:
    said = _Description(format=_FORMAT, fingerprint=fingerprint(model), adapters=describe(adapters))
    try:
        save_file(named_tensors(adapters), directory / TENSORS)
    except SafetensorError as error:
        raise OSError(f"{directory / TENSORS}: {error}") from error
    text = json.dumps(said.model_dump(), indent=2, sort_keys=True)
    (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, directory: str | Path) -> LoadedAdapter:
    """Put the adapters that `editfleet export` wrote beside a plain transformers model.

    The model's weights stay as they are, to the bit, and so do its modes (training, requires_grad);
    it may be in another dtype.

    Args:
        model: the model that lies in the same directory, or the one that the run edited.
        directory: what was exported.

    Raises:
        InputError: the directory holds no adapter, or a damaged one.
        FingerprintMismatchError: it is for another model.
    """
    place = Path(directory)
    expected, adapters = _read(place)
    found = fingerprint(model)
    if found != expected:
        raise FingerprintMismatchError(
            f"{place}: its adapter was made for the model with fingerprint {expected[:12]}, this"
            f" one has {found[:12]}"
        )
    with keeping_modes(model):
        editable = editable_model(model)
    for layer, adapter in adapters:
        if layer >= editable.num_blocks:
            raise FingerprintMismatchError(
                f"{place}: an adapter is for block {layer}, the model has {editable.num_blocks}"
            )
        if misfit := adapter.misfit(editable, layer):
            raise FingerprintMismatchError(f"{place}: the adapter of block {layer}: {misfit}")
    detach = [adapter.attach(editable, layer) for layer, adapter in adapters]
    return LoadedAdapter(model, tuple(adapters), detach)


def _read(place: Path) -> tuple[str, list[tuple[int, Adapter]]]:
    """The fingerprint of the model that the adapters are for, and the adapters."""
    try:
        said = _Description.model_validate_json((place / DESCRIPTION).read_bytes())
        tensors = load_file(place / TENSORS)
        return said.fingerprint, undescribe(said.adapters, tensors)
    except ValidationError as error:
        raise InputError(f"{place / DESCRIPTION} is damaged: {first_problem(error)}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{place} holds no adapter that can be read: {error}") from error
    except ValueError as error:
        raise InputError(f"{place} is damaged: {error}") from error
