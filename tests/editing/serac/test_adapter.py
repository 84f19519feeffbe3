"""A round's edits as a change that is applied, joined, stored and taken back like any other."""

from dataclasses import replace

import pytest
import torch

from pipeline.editing.adapters import MemoryAdapter, make_adapter
from pipeline.editing.serac.memory import MemoryEntry
from pipeline.editing.update import EditedWeights
from tests.cases import draw
from tests.editing.serac.cases import ENTRIES, QUERIES, router, setting


def change(entries: list[MemoryEntry]) -> MemoryAdapter:
    _, editor = setting("gpt2")
    return MemoryAdapter.of(entries, editor.embed_edits(entries, 200))


def test_rounds_add_up_and_are_taken_back() -> None:
    case, editor = setting("gpt2")
    shared, whole = router(editor, []), router(editor)
    weights = EditedWeights(case.editable, (0,))
    for part in (ENTRIES[:1], ENTRIES[1:]):
        weights.apply(0, replace(change(part), router=shared))
    try:
        assert case.editable.router is shared and list(shared.memory) == ENTRIES
        one, other = shared.routes(QUERIES), whole.routes(QUERIES)
        assert torch.equal(one.shares, other.shares) and one.prefixes == other.prefixes
        with weights.unedited():
            assert case.editable.router is None
        assert case.editable.router is shared
    finally:
        weights.revert()
    assert case.editable.router is None
    weights.apply(0, replace(change(ENTRIES[2:]), router=shared))
    assert list(shared.memory) == ENTRIES[2:]
    weights.revert()


def test_what_was_stored_is_what_is_read() -> None:
    kept = change(ENTRIES)
    again = make_adapter("memory", kept.parts, {})
    assert isinstance(again, MemoryAdapter) and again.entries == ENTRIES
    assert MemoryAdapter.joined([change(ENTRIES[:2]), change(ENTRIES[2:])]).entries == ENTRIES


def test_without_its_models_it_fits_no_model() -> None:
    case, editor = setting("gpt2")
    kept = change(ENTRIES)
    assert "load_serac" in str(kept.misfit(case.editable, 0))
    with pytest.raises(ValueError, match="load_serac"):
        EditedWeights(case.editable, (0,)).apply(0, kept)
    narrow = replace(MemoryAdapter.of(ENTRIES, draw(4, 3)), router=router(editor, []))
    assert "3 entries, not 8" in str(narrow.misfit(case.editable, 0))


@pytest.mark.parametrize(
    ("name", "part", "problem"),
    [
        ("texts", torch.tensor([91], dtype=torch.uint8), "cannot be read"),
        ("texts", torch.zeros(3), "no bytes"),
        ("embeddings", draw(3, 8).float(), "4 edits and 3 embeddings"),
        ("more", torch.zeros(1), "with the tensors"),
    ],
)
def test_damaged_parts_are_refused(name: str, part: torch.Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_adapter("memory", {**change(ENTRIES).parts, name: part}, {})
