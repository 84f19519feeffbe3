"""The edit memory: what was edited, with the embeddings that the classifier made of it once.

Appending costs as much as what is appended: the embeddings lie in a buffer that doubles when it is
full. The nearest edit does not depend on the order in which edits were added: candidates from one
matrix product are measured again one by one, and of equally near ones the smallest key wins.

Shapes: M edits, N queries, E size of an embedding.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.editing.serac.scope import distances

CANDIDATES = 8
"""Edits that are measured exactly for a query; a product of matrices in float32 cannot tell apart
what is nearer than its rounding."""
PRODUCT_BYTES = 64 << 20
"""Memory for distances at one time; queries are cut to fit."""


@dataclass(frozen=True)
class MemoryEntry:
    """One edit.

    Attributes:
        key: its name, unique in a memory.
        prompt: x_e, with the subject in its place.
        target: y_e.
    """

    key: str
    prompt: str
    target: str


@dataclass(frozen=True)
class Recall:
    """The nearest edit of every query.

    Attributes:
        entries: N edits; None where the memory is empty.
        distances: (N,) scale * squared distance, infinite where the memory is empty.
    """

    entries: list[MemoryEntry | None]
    distances: Tensor


class Index(Protocol):
    """Finds candidates without looking at every edit; see `pipeline.editing.serac.index`."""

    def update(self, embeddings_ME: Tensor) -> None:
        """Take in the embeddings behind those that it has seen; M only grows."""
        ...

    def remove(self, places: Sequence[int]) -> None:
        """Never find these positions again."""
        ...

    def candidates(self, queries_NE: Tensor, count: int) -> Tensor:
        """Positions of near embeddings, (N, count) int64; -1 where there are fewer."""
        ...


class EditMemory:
    """Edits and their embeddings.

    Args:
        size: E.
        scale: of the squared distance.
        index: finds candidates once more than `exact_below` edits are held; None looks at all.
        exact_below: up to so many edits all are looked at.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: float = 1.0,
        index: Index | None = None,
        exact_below: int = 0,
    ) -> None:
        self.scale = scale
        self._buffer = torch.zeros(16, size)
        self._squares = torch.zeros(16)
        self._entries: list[MemoryEntry | None] = []
        self._places: dict[str, int] = {}
        self._index, self._exact_below = index, exact_below

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[MemoryEntry]:
        """The edits that are held, in the order in which they were added."""
        return (entry for entry in self._entries if entry is not None)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    @property
    def embeddings(self) -> Tensor:
        """(M, E) float32 on the CPU, in the order of the edits."""
        return self._buffer[[self._places[entry.key] for entry in self]]

    def add(self, entries: Sequence[MemoryEntry], embeddings_ME: Tensor) -> None:
        """Add edits with their embeddings.

        Raises:
            ValueError: a key is there already or comes twice, or an embedding is not finite.
        """
        keys = [entry.key for entry in entries]
        if len(set(keys)) < len(keys) or not self._places.keys().isdisjoint(keys):
            raise ValueError("a key of the edit memory is taken")
        if not bool(embeddings_ME.isfinite().all()):
            raise ValueError("an embedding is not finite")
        start = len(self._entries)
        self._make_room(start + len(entries))
        new = embeddings_ME.float().cpu()
        self._buffer[start : start + len(entries)] = new
        self._squares[start : start + len(entries)] = new.square().sum(dim=1)
        self._entries.extend(entries)
        self._places.update((key, start + number) for number, key in enumerate(keys))

    def hold(self, entries: Sequence[MemoryEntry], embeddings_ME: Tensor) -> None:
        """Hold these edits and no others; those that are there already are not touched."""
        wanted = {entry.key for entry in entries}
        self.remove([entry.key for entry in self if entry.key not in wanted])
        new = [place for place, entry in enumerate(entries) if entry.key not in self]
        if new:
            self.add([entries[place] for place in new], embeddings_ME[new])

    def remove(self, keys: Iterable[str]) -> None:
        """Forget edits; queries are answered as if they had never been there.

        Their places stay in the buffer, empty, and are never found.

        Raises:
            KeyError: there is no such edit.
        """
        places = [self._places.pop(key) for key in keys]
        for place in places:
            self._entries[place] = None
        self._squares[places] = torch.inf
        if self._index is not None:
            self._index.remove(places)

    def recall(self, queries_NE: Tensor) -> Recall:
        """The nearest edit of every query, and how far it is."""
        if not self._places:
            return Recall([None] * len(queries_NE), torch.full((len(queries_NE),), torch.inf))
        queries = queries_NE.float().cpu()
        places = self._candidates(queries)
        held = self._squares[places.clamp(min=0)].isfinite() & (places >= 0)
        found = self._buffer[places.clamp(min=0)]
        far = distances(found, queries[:, None], self.scale).masked_fill(~held, torch.inf)
        nearest = far.min(dim=1).values
        entries = [
            self._smallest(places[row, far[row] == nearest[row]].tolist())
            if bool(nearest[row].isfinite())
            else None
            for row in range(len(queries))
        ]
        return Recall(entries, nearest)

    def _smallest(self, places: Sequence[int]) -> MemoryEntry:
        found = [entry for place in places if (entry := self._entries[place]) is not None]
        return min(found, key=lambda entry: entry.key)

    def _candidates(self, queries_NE: Tensor) -> Tensor:
        length = len(self._entries)
        used, squares = self._buffer[:length], self._squares[:length]
        if self._index is not None and length > self._exact_below:
            self._index.update(used)
            return self._index.candidates(queries_NE, CANDIDATES)
        count = min(CANDIDATES, length)
        step = max(1, PRODUCT_BYTES // (4 * length))
        return torch.cat(
            [
                torch.addmm(squares, some, used.T, alpha=-2).topk(count, largest=False).indices
                for some in queries_NE.split(step)
            ]
        )

    def _make_room(self, count: int) -> None:
        if count > len(self._buffer):
            room = max(count, 2 * len(self._buffer)) - len(self._buffer)
            self._buffer = torch.cat([self._buffer, torch.zeros(room, self._buffer.shape[1])])
            self._squares = torch.cat([self._squares, torch.zeros(room)])
