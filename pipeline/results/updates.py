"""Updates and adapters on disk: one safetensors file a layer and round.

An update's tensors have the edited parameter's name; a file whose metadata has `adapter` holds an
adapter's increment of that kind, with its `settings` as JSON.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.editing.adapters import Adapter, make_adapter
from pipeline.editing.update import Change, Update
from pipeline.errors import ResultsDamagedError
from pipeline.results.store import RunStore


def write_update(
    store: RunStore,
    *,
    round: int,
    layer: int,
    weight_name: str,
    update: Change,
    metadata: dict[str, str],
) -> str:
    """Write one layer's update or adapter and list it; return the part's name.

    An update's tensors are `<weight>.dense`, (D, F), or `<weight>.left`, (D, N), and
    `<weight>.right`, (N, F), float32; D are the parameter's outputs and F its inputs, however the
    model stores it. An adapter's have the names of its parts.
    """
    described = {**metadata, "layer": str(layer), "round": str(round)}
    if isinstance(update, Adapter):
        tensors = dict(update.parts)
        settings = json.dumps(update.settings, sort_keys=True)
        described |= {"adapter": update.kind, "settings": settings}
    else:
        tensors = {f"{weight_name}.{part}": tensor for part, tensor in update.parts.items()}
        described["weight"] = weight_name
    return store.write_tensors("update", tensors, round=round, layer=layer, metadata=described)


def read_update(path: Path) -> tuple[int, Change, dict[str, str]]:
    """Read one file of an update or an adapter.

    Returns:
        The layer, the change, and the file's metadata (weight or adapter, layer, round,
        fingerprint, ...).

    Raises:
        ResultsDamagedError: the file is not an update of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layer = int(metadata["layer"])
        if "adapter" in metadata:
            return layer, _adapter(path, parts, metadata, layer), metadata
        weight = metadata["weight"]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ResultsDamagedError(f"{path} is not an update file: {error}") from error
    named = {name.removeprefix(f"{weight}."): tensor for name, tensor in parts.items()}
    if set(named) not in ({"dense"}, {"left", "right"}):
        raise ResultsDamagedError(f"{path} holds unexpected tensors: {', '.join(sorted(parts))}")
    if problem := _problem(named, layer):
        raise ResultsDamagedError(f"{path} {problem}")
    return layer, Update(named), metadata


def _adapter(path: Path, parts: dict[str, Tensor], metadata: dict[str, str], layer: int) -> Adapter:
    try:
        settings = json.loads(metadata["settings"])
        if not isinstance(settings, dict):
            raise ValueError(f"its settings are {metadata['settings']!r}")
        adapter = make_adapter(metadata["adapter"], parts, settings)
    except (KeyError, ValueError) as error:
        raise ResultsDamagedError(f"{path} holds no adapter: {error}") from error
    if problem := _unsound(parts, layer):
        raise ResultsDamagedError(f"{path} {problem}")
    return adapter


def _unsound(parts: dict[str, Tensor], layer: int) -> str | None:
    """Say what keeps tensors from being computed with."""
    if not all(bool(tensor.isfinite().all()) for tensor in parts.values()):
        return "holds infinities or NaNs"
    return None if layer >= 0 else f"is for layer {layer}, which there is none of"


def _problem(parts: dict[str, Tensor], layer: int) -> str | None:
    """Say what keeps tensors from being an update."""
    if any(tensor.dtype != torch.float32 for tensor in parts.values()):
        return "holds tensors that are not float32"
    shapes = [tuple(tensor.shape) for tensor in parts.values()]
    if any(len(shape) != 2 for shape in shapes) or (
        "left" in parts and parts["left"].shape[1] != parts["right"].shape[0]
    ):
        return f"holds tensors of shape {shapes}, which make no matrix"
    return _unsound(parts, layer)
