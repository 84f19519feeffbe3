"""Candidates for the nearest edit of a large memory, from an inverted file of faiss.

Embeddings are put into clusters, and a query looks into the nearest clusters only (Jégou et al.,
"Product quantization for nearest neighbor search", 2011, section IV, without the quantised codes).
It can miss an edit whose cluster is not among them; what it finds is measured exactly all the same.

The clusters come from the first `exact_below` * 2^j embeddings, with the largest j that there are
so many of, and a constant seed: they follow from the sequence of edits, however it was cut into
pieces. Made anew at each doubling, they cost an edit a constant time.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError

_SEED = 1234


class InvertedFile:
    """An index over the embeddings of a memory.

    Args:
        size: E.
        exact_below: of the memory that it is for; clusters come from so many embeddings at least.
        probes: clusters that a query looks into.

    Raises:
        InputError: faiss is not installed.
    """

    def __init__(self, size: int, *, exact_below: int, probes: int = 16) -> None:
        self._faiss = _faiss()
        self._size, self._first, self._probes = size, exact_below, probes
        self._index: Any = None
        self._trained_on = 0
        self._count = 0
        self._removed: set[int] = set()

    def update(self, embeddings_ME: Tensor) -> None:
        """Take in the embeddings behind those that it has seen; M only grows."""
        count = len(embeddings_ME)
        trained_on = self._first << max(0, (count // self._first).bit_length() - 1)
        if trained_on != self._trained_on:
            self._train(embeddings_ME[:trained_on])
            self._trained_on, self._count = trained_on, 0
        if count > self._count:
            new = np.array(
                [i for i in range(self._count, count) if i not in self._removed], dtype=np.int64
            )
            self._index.add_with_ids(embeddings_ME[new].numpy(), new)
            self._count = count

    def remove(self, places: Sequence[int]) -> None:
        """Never find these positions again."""
        self._removed.update(places)
        held = [place for place in places if place < self._count]
        if held:
            self._index.remove_ids(np.array(held, dtype=np.int64))

    def candidates(self, queries_NE: Tensor, count: int) -> Tensor:
        """Positions of near embeddings, (N, count) int64; -1 where there are fewer."""
        _, found = self._index.search(queries_NE.contiguous().numpy(), count)
        return torch.from_numpy(found)

    def _train(self, embeddings_ME: Tensor) -> None:
        clusters = max(1, round(len(embeddings_ME) ** 0.5))
        quantizer = self._faiss.IndexFlatL2(self._size)
        self._index = self._faiss.IndexIVFFlat(quantizer, self._size, clusters)
        self._index.cp.seed = _SEED
        self._index.nprobe = min(self._probes, clusters)
        self._index.train(embeddings_ME.contiguous().numpy())


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise InputError(
            "method.serac.index: faiss is not installed; pip install 'editfleet[index]', or set it"
            " to null to look at every edit"
        ) from error
