"""Trained editors on disk: a directory with `editor.safetensors` and `editor.json`.

An editor is of one model and of some of its layers; it is refused for any other.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.errors import FingerprintMismatchError, InputError, ResultsDamagedError
from pipeline.results.atomic import whole_directory, write_atomically
from pipeline.results.encoding import with_sorted_header
from pipeline.spec import MethodSpec

WEIGHTS, CARD = "editor.safetensors", "editor.json"
FORMAT_VERSION = 1


class EditorCard(BaseModel):
    """What `editor.json` says of an editor."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    format_version: Literal[1]
    kind: str
    """The method that it is for."""
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of the unedited model that it was trained on."""
    model: str
    """Where that model was."""
    layers: tuple[int, ...]
    settings: dict[str, Any]
    """Of the method, as far as the editor depends on them."""
    train: dict[str, Any]
    """How it was trained."""
    requests_sha256: str
    """Digest of the requests that it was trained and measured on."""
    steps: int
    """Steps that were made; the editor may be that of an earlier one."""
    validation: dict[str, float]
    """The best measurement; empty without one."""
    versions: dict[str, str | None]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of editor.safetensors."""


def write_editor(directory: Path, card: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an editor's directory, which is there whole or not at all.

    Args:
        directory: it; must not exist.
        card: the entries of `EditorCard` but for the version and the digest.
        tensors: its parameters.

    Raises:
        OSError: the disk is full or not writable.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    data = with_sorted_header(save(contiguous, metadata={"kind": str(card["kind"])}))
    digest = hashlib.sha256(data).hexdigest()
    whole = EditorCard.model_validate({"format_version": 1, **card, "sha256": digest})
    with whole_directory(directory) as place:
        write_atomically(place / WEIGHTS, data)
        write_atomically(place / CARD, whole.model_dump_json(indent=2).encode() + b"\n")


def read_card(path: str | Path, setting: str) -> EditorCard:
    """Read what an editor's directory says of it.

    Args:
        path: the directory.
        setting: what names it in the spec, for messages.

    Raises:
        InputError: there is none.
        ResultsDamagedError: its card is damaged.
    """
    place = Path(path)
    try:
        text = (place / CARD).read_bytes()
    except OSError as error:
        raise InputError(
            f"{setting}: {place} is no editor: it has no {CARD}; name the directory editor/ of a"
            " run of `editfleet train`"
        ) from error
    try:
        return EditorCard.model_validate_json(text)
    except ValidationError as error:
        raise ResultsDamagedError(
            f"{place / CARD} is damaged: {error.errors()[0]['msg']}; restore it from a copy"
        ) from error


def read_tensors(path: str | Path, sha256: str) -> dict[str, Tensor]:
    """Read an editor's parameters.

    Raises:
        ResultsDamagedError: the file is missing or not the one with this digest.
    """
    place = Path(path) / WEIGHTS
    try:
        data = place.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ResultsDamagedError(
                f"{place} is not the file that was trained: its SHA-256 differs from {CARD}'s;"
                " restore it from a copy"
            )
        found: dict[str, Tensor] = load(data)
    except (OSError, SafetensorError) as error:
        raise ResultsDamagedError(f"{place} cannot be read: {error}") from error
    return found


def require_own_editor(method: MethodSpec, fingerprint: str) -> None:
    """Check that a method's editor, if it has one, was trained on the model that it is to edit.

    Args:
        method: the resolved method.
        fingerprint: the model's.

    Raises:
        FingerprintMismatchError: it was not.
    """
    if method.trained is None or method.trained.editor is None:
        return
    path, setting = method.trained.editor, f"method.{method.name}.editor"
    card = read_card(path, setting)
    if card.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"{setting}: the editor {path} was trained on another model ({card.model}, fingerprint"
            f" {card.fingerprint[:12]}) than this one ({fingerprint[:12]}); train one on it with"
            " `editfleet train`"
        )
