"""Adapters of several blocks in one file: tensors under their names, the rest as JSON."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.editing.adapters import Adapter, make_adapter
from pipeline.errors import ResultsDamagedError
from pipeline.results.damage import first_problem
from pipeline.results.store import RunStore


class DescribedAdapter(BaseModel):
    """What is said of an adapter beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layer: Annotated[int, Field(ge=0)]
    kind: str
    settings: dict[str, Any]


_DESCRIBED = TypeAdapter(list[DescribedAdapter])


def describe(adapters: Iterable[tuple[int, Adapter]]) -> list[DescribedAdapter]:
    """What is to be said of adapters, each with its layer."""
    return [
        DescribedAdapter(layer=layer, kind=adapter.kind, settings=dict(adapter.settings))
        for layer, adapter in adapters
    ]


def named_tensors(adapters: Iterable[tuple[int, Adapter]]) -> dict[str, Tensor]:
    """The tensors of adapters, as `<layer>.<kind>.<part>`."""
    return {
        f"{layer}.{adapter.kind}.{name}": part.contiguous()
        for layer, adapter in adapters
        for name, part in adapter.parts.items()
    }


def undescribe(
    described: Iterable[DescribedAdapter], tensors: Mapping[str, Tensor]
) -> list[tuple[int, Adapter]]:
    """Adapters of what was said of them and their tensors, each with its layer.

    Raises:
        ValueError: they do not fit.
    """
    found = []
    for one in described:
        prefix = f"{one.layer}.{one.kind}."
        parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        found.append((one.layer, make_adapter(one.kind, parts, one.settings)))
    return found


def write_piece(store: RunStore, adapters: Mapping[int, Adapter], *, round: int, piece: int) -> str:
    """Write what a piece of a round's edits is, layer -> adapter; return the part's name."""
    pairs = sorted(adapters.items())
    said = [one.model_dump() for one in describe(pairs)]
    metadata = {"round": str(round), "piece": str(piece), "adapters": json.dumps(said)}
    tensors = named_tensors(pairs)
    return store.write_tensors("piece", tensors, round=round, layer=piece, metadata=metadata)


def read_piece(path: Path) -> dict[int, Adapter]:
    """Read a piece: layer -> adapter.

    Raises:
        ResultsDamagedError: the file is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = _DESCRIBED.validate_json((file.metadata() or {})["adapters"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return dict(undescribe(said, tensors))
    except ValidationError as error:
        raise ResultsDamagedError(f"{path} is damaged: {first_problem(error)}") from error
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ResultsDamagedError(f"{path} is no piece of a round's adapters: {error}") from error
