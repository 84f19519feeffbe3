"""Batched tracing against the plain procedure, one restored state at a time, in float64."""

from functools import cache

import numpy as np
import pytest
import torch

from pipeline.tracing.facts import Fact, subject_ids, tokenize_facts
from pipeline.tracing.names import KINDS, Kind
from pipeline.tracing.recording import draw_noise, embedding_deviation
from pipeline.tracing.runs import window_of
from pipeline.tracing.trace import FactTrace, TraceSettings, trace
from tests.cases import ALL_FAMILIES, EDITS, case, requests
from tests.oracles.tracing import PlainTrace

SETTINGS = TraceSettings(noise=0.7, samples=3, window=3, seed=5)


def facts_of(family: str) -> list[Fact]:
    """Subjects inside, at the start and alone; two facts are of the same length."""
    tiny = case(family)
    chosen = [EDITS[4], EDITS[1], EDITS[3], EDITS[1]]
    return tokenize_facts(tiny.tokenizer, requests(chosen), known=False)


@cache
def traced(family: str, max_tokens: int = 4096) -> list[FactTrace]:
    return trace(case(family).editable, facts_of(family), SETTINGS, max_tokens=max_tokens)


def plain(family: str, fact: Fact, settings: TraceSettings = SETTINGS) -> PlainTrace:
    tiny = case(family)
    mlps = tiny.down_projections
    if family != "opt":
        mlps = [block.mlp for block in tiny.blocks]
    name = {"gpt2": "attn", "gptj": "attn"}.get(family, "self_attn")
    name = "attention" if family.startswith("gpt_neox") else name
    attentions = [getattr(block, name) for block in tiny.blocks]
    width = tiny.model.get_input_embeddings().weight.shape[1]
    noise = draw_noise(settings.samples, fact.end - fact.begin, width, settings.seed)
    subject = fact.begin, fact.end
    return PlainTrace(
        tiny.model, tiny.blocks, mlps, attentions, list(fact.ids), subject, settings.noise * noise
    )


def plain_value(
    oracle: PlainTrace, kind: Kind, token: int, layer: int, settings: TraceSettings = SETTINGS
) -> float:
    if kind == "state":
        return oracle.restored_states([(token, layer)])
    if kind in ("mlp", "attention"):
        window = window_of(layer, settings.window, len(oracle.blocks))
        return oracle.restored_window(kind, token, list(window))
    return oracle.severed(kind.removeprefix("severed_"), token, layer)


# Flattened MLPs without a module of their own, parallel blocks, norms behind modules with windows.
_TELLING = ("gpt2", "opt", "gptj", "gemma2")
_FAMILIES = [
    family if family in _TELLING else pytest.param(family, marks=pytest.mark.slow)
    for family in ALL_FAMILIES
]


@pytest.mark.parametrize("family", _FAMILIES)
def test_tracing_is_the_plain_procedure(family: str) -> None:
    """A short fact with tokens before its subject and after it, in all kinds and layers."""
    tiny = case(family)
    (fact,) = tokenize_facts(tiny.tokenizer, requests([EDITS[4]]), known=False)
    (found,) = trace(tiny.editable, [fact], SETTINGS, max_tokens=4096)
    oracle = plain(family, fact)
    assert found.answer == oracle.answer
    assert found.clean == pytest.approx(oracle.clean, rel=tiny.tolerance)
    assert found.corrupted == pytest.approx(oracle.corrupted(), rel=tiny.tolerance)
    for kind in KINDS:
        for token in (fact.begin, fact.end + 1, len(fact.ids) - 1):
            for layer in range(len(oracle.blocks)):
                expected = plain_value(oracle, kind, token, layer)
                actual = found.restored[kind][token, layer]
                assert actual == pytest.approx(expected, rel=tiny.tolerance), (kind, token, layer)


def test_other_facts_of_a_batch_are_the_plain_procedure_too() -> None:
    for fact, found in zip(facts_of("gpt2")[1:3], traced("gpt2")[1:3], strict=True):
        oracle = plain("gpt2", fact)
        for kind in KINDS:
            for token in (fact.end - 1, len(fact.ids) - 1):
                for layer in (0, 2):
                    expected = plain_value(oracle, kind, token, layer)
                    assert found.restored[kind][token, layer] == pytest.approx(expected, rel=1e-9)


def test_batches_change_nothing_but_rounding() -> None:
    (alone,) = trace(case("gpt2").editable, facts_of("gpt2")[:1], SETTINGS, max_tokens=1)
    for kind in KINDS:
        np.testing.assert_allclose(
            alone.restored[kind], traced("gpt2")[0].restored[kind], rtol=1e-9
        )
    twin, again = traced("gpt2")[1], traced("gpt2")[3]
    np.testing.assert_allclose(twin.restored["state"], again.restored["state"], rtol=1e-12)


def test_the_same_seed_gives_the_same_map() -> None:
    model, facts = case("gpt2").editable, facts_of("gpt2")[:1]
    again = trace(model, facts, SETTINGS, max_tokens=2048)[0]
    alone = trace(model, facts, SETTINGS, max_tokens=2048)[0]
    for kind in KINDS:
        np.testing.assert_array_equal(again.restored[kind], alone.restored[kind])
    other = TraceSettings(noise=0.7, samples=3, window=3, seed=6)
    assert trace(model, facts, other, max_tokens=2048)[0].corrupted != alone.corrupted


def test_without_noise_everything_is_the_clean_run() -> None:
    silent = TraceSettings(noise=0.0, samples=2, window=3)
    for found in trace(case("llama").editable, facts_of("llama")[:1], silent, max_tokens=2048):
        assert found.corrupted == pytest.approx(found.clean, rel=1e-12)
        for values in found.restored.values():
            np.testing.assert_allclose(values, found.clean, rtol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_noise_is_measured_in_the_deviation_of_the_subjects_embeddings(family: str) -> None:
    tiny = case(family)
    rows = subject_ids(tiny.tokenizer, [edit.subject for edit in EDITS])
    vectors = tiny.model.get_input_embeddings().weight[[token for row in rows for token in row]]
    expected = float(vectors.detach().std())
    assert embedding_deviation(tiny.editable, rows) == pytest.approx(expected, rel=1e-12)
    assert embedding_deviation(tiny.editable, []) == 0.0


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_what_must_be_restored_or_not(family: str) -> None:
    """The last token's last state is the clean run; nothing before the subject has an effect."""
    for fact, found in zip(facts_of(family), traced(family), strict=True):
        state = found.restored["state"]
        assert state[-1, -1] == found.clean
        assert (state[:-1, -1] == found.corrupted).all()
        for kind in KINDS:
            assert (found.restored[kind][: fact.begin] == found.corrupted).all()
        # With nothing left above to be cut off, the severed graph is the whole one.
        for kind in ("severed_mlp", "severed_attention"):
            assert (found.restored[kind][:, -1] == state[:, -1]).all()


def test_the_plain_procedure_has_the_invariants_of_tracing() -> None:
    """Restoring everything gives the clean run; the oracle is held to it, and so is the batch."""
    fact = facts_of("llama")[0]
    oracle = plain("llama", fact)
    tokens = range(len(fact.ids))
    for layer in range(4):
        whole = oracle.restored_states([(token, layer) for token in tokens])
        assert whole == pytest.approx(oracle.clean, rel=1e-12)
    subject = list(range(fact.begin, fact.end))
    assert oracle.restored_embeddings(subject) == pytest.approx(oracle.clean, rel=1e-12)
    partly = oracle.restored_states([(token, 0) for token in subject])
    assert abs(partly - oracle.clean) > 1e-6


def test_a_window_of_all_blocks_on_the_only_token_after_is_a_state() -> None:
    """With a one-token subject at the end, its clean attention and MLP of all blocks are not its
    clean state: the embedding under them keeps its noise."""
    tiny = case("gpt2")
    ids = tuple(tiny.tokenizer("They said that it was in")["input_ids"])
    fact = Fact(ids, len(ids) - 1, len(ids))
    wide = TraceSettings(noise=2.0, samples=3, window=99)
    (found,) = trace(tiny.editable, [fact], wide, max_tokens=2048)
    assert found.restored["state"][-1, 0] == pytest.approx(found.clean, rel=1e-9)
    assert abs(found.restored["mlp"][-1, 0] - found.clean) > 1e-4
    assert np.ptp(found.restored["mlp"][-1]) < 1e-9, "every window is the whole model"


def test_facts_with_another_answer_are_left_alone() -> None:
    facts = facts_of("gpt2")[:2]
    answer = traced("gpt2")[0].answer
    expecting = [
        Fact(fact.ids, fact.begin, fact.end, expected)
        for fact, expected in zip(facts, (answer, answer + 1), strict=True)
    ]
    known, other = trace(case("gpt2").editable, expecting, SETTINGS, max_tokens=2048)
    np.testing.assert_array_equal(known.restored["mlp"], traced("gpt2")[0].restored["mlp"])
    assert other.restored == {} and other.clean > 0


def test_every_token_has_one_class() -> None:
    fact = Fact(tuple(range(9)), 2, 5)
    assert [fact.token_class(token) for token in range(9)] == [
        *("before", "before", "first_subject", "middle_subject", "last_subject"),
        *("first_after", "further", "further", "last"),
    ]
    alone = Fact((1, 2), 1, 2)
    assert [alone.token_class(token) for token in range(2)] == ["before", "last_subject"]
    ending = Fact((1, 2, 3), 0, 2)
    assert ending.token_class(2) == "last"


def test_half_precision_follows_within_its_rounding() -> None:
    tiny = case("gpt2", torch.float32)
    (found,) = trace(tiny.editable, facts_of("gpt2")[:1], SETTINGS, max_tokens=2048)
    expected = traced("gpt2")[0]
    for kind in KINDS:
        np.testing.assert_allclose(found.restored[kind], expected.restored[kind], rtol=1e-3)
