"""Adapters beside a saved model: written by `editfleet export`, loaded with one call.

`adapter.safetensors` holds their tensors as `<layer>.<kind>.<part>`, `adapter.json` the rest.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.editing.adapters import Adapter, make_adapter
from pipeline.editing.update import EditedWeights
from pipeline.errors import FingerprintMismatchError, InputError
from pipeline.models.editable import EditableModel
from pipeline.models.loading import fingerprint, save_model
from pipeline.results.damage import first_problem

TENSORS, DESCRIPTION = "adapter.safetensors", "adapter.json"
_FORMAT = 1


class _Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layer: Annotated[int, Field(ge=0)]
    kind: str
    settings: dict[str, Any]


class _Description(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Annotated[int, Field(ge=_FORMAT, le=_FORMAT)]
    fingerprint: str
    adapters: list[_Described]


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
    tensors = {
        f"{layer}.{adapter.kind}.{name}": part.contiguous()
        for layer, adapter in adapters
        for name, part in adapter.parts.items()
    }
    described = _Description(
        format=_FORMAT,
        fingerprint=fingerprint(model),
        adapters=[
            _Described(layer=layer, kind=adapter.kind, settings=dict(adapter.settings))
            for layer, adapter in adapters
        ],
    )
    try:
        save_file(tensors, directory / TENSORS)
    except SafetensorError as error:
        raise OSError(f"{directory / TENSORS}: {error}") from error
    text = json.dumps(described.model_dump(), indent=2, sort_keys=True)
    (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def load_adapter(model: PreTrainedModel, directory: str | Path) -> LoadedAdapter:
    """Put the adapters that `editfleet export` wrote beside a plain transformers model.

    The model's weights stay as they are, to the bit; it may be in another dtype.

    Args:
        model: the model that lies in the same directory, or the one that the run edited.
        directory: what was exported.

    Raises:
        InputError: the directory holds no adapter, or a damaged one.
        FingerprintMismatchError: it is for another model.
    """
    place = Path(directory)
    described, adapters = _read(place)
    found = fingerprint(model)
    if found != described.fingerprint:
        raise FingerprintMismatchError(
            f"{place}: its adapter was made for the model with fingerprint"
            f" {described.fingerprint[:12]}, this one has {found[:12]}"
        )
    editable = EditableModel(model)
    for layer, adapter in adapters:
        if layer >= editable.num_blocks:
            raise FingerprintMismatchError(
                f"{place}: an adapter is for block {layer}, the model has {editable.num_blocks}"
            )
        if misfit := adapter.misfit(editable, layer):
            raise FingerprintMismatchError(f"{place}: the adapter of block {layer}: {misfit}")
    detach = [adapter.attach(editable, layer) for layer, adapter in adapters]
    return LoadedAdapter(model, tuple(adapters), detach)


def _read(place: Path) -> tuple[_Description, list[tuple[int, Adapter]]]:
    try:
        content = (place / DESCRIPTION).read_bytes()
        described = _Description.model_validate_json(content)
        tensors = load_file(place / TENSORS)
    except ValidationError as error:
        raise InputError(f"{place / DESCRIPTION} is damaged: {first_problem(error)}") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{place} holds no adapter that can be read: {error}") from error
    return described, [(one.layer, _adapter(one, tensors, place)) for one in described.adapters]


def _adapter(one: _Described, tensors: dict[str, Tensor], place: Path) -> Adapter:
    prefix = f"{one.layer}.{one.kind}."
    parts = {n.removeprefix(prefix): part for n, part in tensors.items() if n.startswith(prefix)}
    try:
        return make_adapter(one.kind, parts, one.settings)
    except ValueError as error:
        raise InputError(f"{place} is damaged: {error}") from error
