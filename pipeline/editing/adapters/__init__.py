"""Adapters by their stored name; a new kind is one more entry."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.editing.adapters.base import Adapter
from pipeline.editing.adapters.memory import MemoryAdapter
from pipeline.editing.adapters.neurons import NeuronBank

KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (NeuronBank, MemoryAdapter)}

__all__ = ["KINDS", "Adapter", "MemoryAdapter", "NeuronBank", "make_adapter"]


def make_adapter(kind: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Adapter:
    """Make an adapter of what was stored.

    Raises:
        ValueError: the kind is unknown, or tensors or settings are not of this kind.
    """
    if kind not in KINDS:
        raise ValueError(f"an adapter of the unknown kind {kind!r}; known: {', '.join(KINDS)}")
    adapter = KINDS[kind](dict(parts), dict(settings))
    if problem := adapter.problem():
        raise ValueError(problem)
    return adapter
