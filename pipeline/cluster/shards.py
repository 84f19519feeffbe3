"""Shards of a phase's work, and the queue in which they wait for workers."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Any


@dataclass(frozen=True)
class Shard:
    """Consecutive items of a plan (requests, texts); `index` names its parts on disk."""

    index: int
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Piece:
    """A shard or a part of one, on its way; `start` is where in the shard it begins."""

    shard: Shard
    start: int
    items: tuple[Any, ...]
    retries: int = 0


class PieceQueue:
    """Pieces that wait for a worker; each goes to the one that had its shard, where that is free.

    Giving one out takes time logarithmic in the pieces and linear in the idle workers.

    Args:
        pieces: in the order in which they are to be given out.
        home: shard index -> the worker that had it last; written whenever one is given out.
    """

    def __init__(self, pieces: Iterable[Piece], home: dict[int, int]) -> None:
        self._home = home
        # By home, None for pieces without one. Each piece is in `_all` as well, which says what
        # comes first when nobody is at home.
        self._heaps: dict[int | None, list[tuple[int, Piece]]] = {}
        self._all: list[tuple[int, Piece]] = []
        self._taken: set[int] = set()
        self._waiting = 0
        self._front = count(-1, -1)
        for number, piece in enumerate(pieces):
            self._add(number, piece)

    def __len__(self) -> int:
        return self._waiting

    def put_back(self, *pieces: Piece) -> None:
        """Let these come before all others, in their order."""
        for piece in reversed(pieces):
            self._add(next(self._front), piece)

    def take(self, idle: Collection[int], first: int = 0) -> tuple[int, Piece]:
        """Give out a piece: the first that is at home at an idle worker or nowhere, else the first.

        Args:
            idle: numbers of the free workers, at least one.
            first: the worker to begin with.

        Returns:
            The worker, the lowest number from `first` on that fits, else the lowest of all, and
            the piece, which waits no longer.
        """
        order = sorted(idle, key=lambda worker: (worker < first, worker))
        for worker in order:
            heads = [head for home in (worker, None) if (head := self._head(self._heap(home)))]
            if heads:
                return self._give(worker, *min(heads, key=lambda head: head[0]))
        head = self._head(self._all)
        assert head is not None, "nothing waits"
        return self._give(order[0], *head)

    def _give(self, worker: int, number: int, piece: Piece) -> tuple[int, Piece]:
        self._taken.add(number)
        self._waiting -= 1
        self._home[piece.shard.index] = worker
        return worker, piece

    def _add(self, number: int, piece: Piece) -> None:
        for heap in (self._heap(self._home.get(piece.shard.index)), self._all):
            heappush(heap, (number, piece))
        self._waiting += 1

    def _heap(self, home: int | None) -> list[tuple[int, Piece]]:
        return self._heaps.setdefault(home, [])

    def _head(self, heap: list[tuple[int, Piece]]) -> tuple[int, Piece] | None:
        """The first of a heap that still waits."""
        while heap and heap[0][0] in self._taken:
            heappop(heap)
        return heap[0] if heap else None
