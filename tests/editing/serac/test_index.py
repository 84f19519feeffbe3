"""The index of a large memory: what it finds, and that pieces and removals change nothing."""

import pytest
import torch
from torch import Tensor

from pipeline.editing.serac.index import InvertedFile
from pipeline.editing.serac.memory import EditMemory, MemoryEntry
from tests.cases import draw

SIZE, FIRST = 8, 50


def entries(count: int) -> list[MemoryEntry]:
    return [MemoryEntry(f"{i:04}", f"prompt {i}", f"target {i}") for i in range(count)]


def memory(probes: int = 100) -> EditMemory:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    index = InvertedFile(SIZE, exact_below=FIRST, probes=probes)
    return EditMemory(SIZE, index=index, exact_below=FIRST)


def embeddings(count: int) -> Tensor:
    return draw(count, SIZE, seed=3).float()


def test_with_all_clusters_it_finds_what_the_whole_memory_does() -> None:
    held, queries = embeddings(300), draw(40, SIZE, seed=4).float()
    indexed, whole = memory(), EditMemory(SIZE)
    for one in (indexed, whole):
        one.add(entries(300), held)
    assert indexed.recall(queries).entries == whole.recall(queries).entries
    assert torch.equal(indexed.recall(queries).distances, whole.recall(queries).distances)


def test_pieces_make_the_index_of_the_whole() -> None:
    held, queries = embeddings(300), draw(200, SIZE, seed=5).float()
    at_once, in_pieces = memory(probes=1), memory(probes=1)
    at_once.add(entries(300), held)
    for start in range(0, 300, 17):
        in_pieces.add(entries(300)[start : start + 17], held[start : start + 17])
        in_pieces.recall(queries[:1])
    assert at_once.recall(queries).entries == in_pieces.recall(queries).entries


def test_what_was_removed_is_not_found() -> None:
    held = embeddings(300)
    indexed = memory()
    indexed.add(entries(300)[:200], held[:200])
    indexed.recall(held[:1])
    indexed.remove([entry.key for entry in entries(300)[50:150]])
    indexed.add(entries(300)[200:], held[200:])
    found = indexed.recall(held)
    left = [entry for i, entry in enumerate(entries(300)) if not 50 <= i < 150]
    whole = EditMemory(SIZE)
    whole.add(left, held[[int(entry.key) for entry in left]])
    assert found.entries == whole.recall(held).entries


def test_a_small_memory_asks_no_index() -> None:
    class Untouched:
        def update(self, embeddings_ME: Tensor) -> None:
            raise AssertionError("the memory is small")

        def candidates(self, queries_NE: Tensor, count: int) -> Tensor:
            raise AssertionError("the memory is small")

        def remove(self, places: object) -> None:
            raise AssertionError("nothing was removed")

    held = embeddings(FIRST)
    small = EditMemory(SIZE, index=Untouched(), exact_below=FIRST)
    small.add(entries(FIRST), held)
    assert small.recall(held).entries == entries(FIRST)
