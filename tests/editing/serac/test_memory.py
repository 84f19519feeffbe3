"""The edit memory: nearest edits, order, removal, and what appending costs."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.editing.serac.memory import EditMemory, MemoryEntry
from tests.cases import draw

SIZE = 6


def entries(count: int) -> list[MemoryEntry]:
    return [MemoryEntry(f"{i:04}", f"prompt {i}", f"target {i}") for i in range(count)]


def filled(embeddings: Tensor, order: list[int] | None = None, **options: Any) -> EditMemory:
    """A memory to which edits were added in an order, some at a time."""
    memory = EditMemory(embeddings.shape[1], **options)
    order = list(range(len(embeddings))) if order is None else order
    whole = entries(len(embeddings))
    for start in range(0, len(order), 7):
        some = order[start : start + 7]
        memory.add([whole[i] for i in some], embeddings[some])
    return memory


def plain_nearest(embeddings: Tensor, query: Tensor) -> tuple[int, float]:
    far = [float(((row - query) ** 2).sum()) for row in embeddings.double()]
    return min(range(len(far)), key=far.__getitem__), min(far)


def test_the_nearest_edit_is_found() -> None:
    embeddings, queries = draw(50, SIZE).float(), draw(20, SIZE, seed=1).float()
    found = filled(embeddings, scale=0.5).recall(queries)
    for row, query in enumerate(queries):
        place, far = plain_nearest(embeddings, query.double())
        assert found.entries[row] == entries(50)[place]
        assert float(found.distances[row]) == pytest.approx(0.5 * far, rel=1e-6)


def test_an_empty_memory_finds_nothing() -> None:
    found = EditMemory(SIZE).recall(draw(3, SIZE))
    assert found.entries == [None] * 3
    assert found.distances.tolist() == [torch.inf] * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40))
def test_the_order_of_edits_does_not_matter(seed: int, count: int) -> None:
    # Rows that are equal, and rows that float32's product cannot tell apart.
    embeddings = 100 + draw(count, SIZE, seed=seed % 1000).float()
    embeddings[1] = embeddings[0]
    queries = embeddings + 1e-3 * draw(count, SIZE, seed=7).float()
    order = list(range(count))
    random.Random(seed).shuffle(order)
    one, other = filled(embeddings).recall(queries), filled(embeddings, order).recall(queries)
    assert one.entries == other.entries
    assert torch.equal(one.distances, other.distances)


def test_removing_an_edit_brings_back_what_was_before() -> None:
    embeddings, queries = draw(30, SIZE).float(), draw(30, SIZE, seed=2).float()
    before = filled(embeddings[:20]).recall(queries)
    memory = filled(embeddings)
    changed = memory.recall(queries)
    assert changed.entries != before.entries
    memory.remove([entry.key for entry in entries(30)[20:]])
    after = memory.recall(queries)
    assert after.entries == before.entries
    assert torch.equal(after.distances, before.distances)
    assert len(memory) == 20 and list(memory) == entries(20)
    assert torch.equal(memory.embeddings, embeddings[:20])
    memory.remove([entry.key for entry in entries(20)])
    assert memory.recall(queries).entries == [None] * 30


def test_a_removed_edit_can_come_again() -> None:
    embeddings = draw(3, SIZE).float()
    memory = filled(embeddings)
    memory.remove(["0001"])
    memory.add([MemoryEntry("0001", "another", "target")], embeddings[1:2])
    assert memory.recall(embeddings[1:2]).entries == [MemoryEntry("0001", "another", "target")]


def test_appending_moves_what_is_there_seldom() -> None:
    memory, moves, last = EditMemory(SIZE), 0, 0
    for number, entry in enumerate(entries(1000)):
        memory.add([entry], draw(1, SIZE, seed=number))
        place = memory._buffer.data_ptr()
        moves, last = moves + (place != last), place
    assert moves <= 8  # 16 doubled until it holds 1000, and the first
    assert len(memory) == 1000


def test_a_key_is_unique_and_an_embedding_finite() -> None:
    memory = filled(draw(2, SIZE))
    with pytest.raises(ValueError, match="taken"):
        memory.add(entries(1), draw(1, SIZE))
    with pytest.raises(ValueError, match="finite"):
        memory.add([MemoryEntry("new", "p", "t")], torch.full((1, SIZE), torch.nan))
    with pytest.raises(KeyError):
        memory.remove(["no such edit"])
    assert len(memory) == 2
