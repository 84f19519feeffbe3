"""An edit memory beside a model: SERAC's edits (arXiv 2206.06520)."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from pipeline.editing.adapters.base import Adapter
from pipeline.editing.serac.memory import MemoryEntry
from pipeline.editing.serac.router import SeracRouter
from pipeline.models.editable import EditableModel


@dataclass(frozen=True)
class MemoryAdapter(Adapter):
    """M edits with their embeddings.

    Its parts are embeddings (M, E), (0, 0) where there is no edit, and texts, the bytes of a JSON
    list of [key, prompt, target].

    Attributes:
        router: the trained models that it is used with; it is not stored, and without it the
            adapter cannot be put beside a model.
    """

    kind = "memory"

    router: SeracRouter | None = None

    @classmethod
    def of(cls, entries: Sequence[MemoryEntry], embeddings_ME: Tensor) -> Self:
        """Keep edits and their embeddings, float32, on the CPU."""
        rows = [[entry.key, entry.prompt, entry.target] for entry in entries]
        content = bytearray(json.dumps(rows, ensure_ascii=False).encode())
        texts = torch.frombuffer(content, dtype=torch.uint8)
        return cls({"embeddings": embeddings_ME.detach().float().cpu(), "texts": texts})

    @classmethod
    def joined(cls, increments: Sequence[Self]) -> Self:
        entries = [entry for one in increments for entry in one.entries]
        found = [one.parts["embeddings"] for one in increments if one.entries]
        both = cls.of(entries, torch.cat(found) if found else torch.zeros(0, 0))
        return cls(both.parts, both.settings, increments[-1].router)

    @cached_property
    def entries(self) -> list[MemoryEntry]:
        """The edits, in the order of their embeddings."""
        content = self.parts["texts"].numpy().tobytes()
        return [MemoryEntry(*row) for row in json.loads(content)]

    def without(self, keys: Collection[str]) -> Self:
        """The same without some edits."""
        kept = [place for place, entry in enumerate(self.entries) if entry.key not in keys]
        entries = [self.entries[place] for place in kept]
        found = self.of(entries, self.parts["embeddings"][kept])
        return replace(found, router=self.router)

    def attach(self, model: EditableModel, layer: int) -> Callable[[], None]:
        router = self.router
        assert router is not None, "bind the adapter first"
        router.memory.hold(self.entries, self.parts["embeddings"])
        model.router = router

        def detach() -> None:
            model.router = None

        return detach

    def problem(self) -> str | None:
        if set(self.parts) != {"embeddings", "texts"}:
            return f"a memory with the tensors {', '.join(sorted(self.parts))}"
        if self.parts["texts"].dtype != torch.uint8 or self.parts["embeddings"].ndim != 2:
            return "a memory whose texts are no bytes or whose embeddings are no matrix"
        try:
            entries = self.entries
        except (ValueError, TypeError) as error:
            return f"a memory whose texts cannot be read: {error}"
        if not all(isinstance(text, str) for e in entries for text in (e.key, e.prompt, e.target)):
            return "a memory whose texts are no strings"
        if len({entry.key for entry in entries}) < len(entries):
            return "a memory that holds an edit twice"
        if len(entries) != len(self.parts["embeddings"]):
            return (
                f"a memory of {len(entries)} edits and {len(self.parts['embeddings'])} embeddings"
            )
        return None

    def misfit(self, model: EditableModel, layer: int) -> str | None:
        if self.router is None:
            return "an edit memory needs its trained models; load it with pipeline.load_serac"
        if not self.entries:
            return None
        width, size = self.parts["embeddings"].shape[1], self.router.editor.encoder.size
        return None if width == size else f"its embeddings have {width} entries, not {size}"
