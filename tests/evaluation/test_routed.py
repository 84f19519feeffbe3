"""Probes whose prompts another model answers: scored and continued as the plain way does."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest

from pipeline.editing.adapters import MemoryAdapter
from pipeline.editing.serac.router import Mode
from pipeline.editing.update import EditedWeights
from pipeline.errors import InputError
from pipeline.evaluation.general import measure
from pipeline.evaluation.generation import generate
from pipeline.evaluation.probes import Probe
from pipeline.evaluation.scoring import score
from pipeline.models.editable import EditableModel
from tests.cases import Case
from tests.editing.serac.cases import ENTRIES, FAMILIES, QUERIES, router, setting
from tests.oracles import serac as oracle

ANSWERS = ["the", "Port Velmora", "Port Velmora.", "Kováč the violinist of Rome"]
PROBES = [
    Probe("case", "rewrite", i, query, ANSWERS[i % 4], ANSWERS[(i + 1) % 4])
    for i, query in enumerate(QUERIES)
]


@contextmanager
def routed(family: str, mode: Mode) -> Iterator[tuple[Case, EditableModel]]:
    case, editor = setting(family)
    case.editable.router = router(editor, mode=mode)
    try:
        yield case, case.editable
    finally:
        case.editable.router = None


def plain(case: Case, family: str, mode: Mode, prompt: str, answer: str) -> tuple[float, bool]:
    """Mean NLL of an answer and whether each token is the argmax."""
    edit, share = nearest(family, mode)[prompt]
    h = setting(family)[1].counterfactual.model.model
    ids = case.tokenizer(oracle.spaced(answer), add_special_tokens=False)["input_ids"]
    nll, exact = 0.0, True
    for i, token in enumerate(ids):
        chances = oracle.answer_probabilities(
            case.model, h, case.tokenizer, prompt, ids[:i], edit, share
        )
        nll -= float(chances[token].log())
        exact = exact and int(chances.argmax()) == token
    return nll / len(ids), exact


@cache
def nearest(family: str, mode: Mode) -> dict[str, tuple[oracle.Stored, float]]:
    """Of every query the nearest edit and h's share."""
    _, editor = setting(family)
    one = router(editor, mode=mode)
    entries = editor.recall(one.memory, QUERIES, 200).entries
    shares = one.routes(QUERIES).shares.tolist()
    return {
        query: (oracle.Stored(entry.prompt, entry.target), share)
        for query, entry, share in zip(QUERIES, entries, shares, strict=True)
        if entry is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_scores_are_the_plain_ones(family: str, mode: Mode) -> None:
    with routed(family, mode) as (case, model):
        whole = score(model, case.tokenizer, PROBES, max_tokens=1000)
        found = score(model, case.tokenizer, PROBES, max_tokens=30)
    for probe, one, other in zip(PROBES, found, whole, strict=True):
        assert probe.target_new and probe.target_true
        new = plain(case, family, mode, probe.prompt, probe.target_new)
        true = plain(case, family, mode, probe.prompt, probe.target_true)
        assert one.nll_new == pytest.approx(new[0], rel=1e-5)
        assert one.nll_true == pytest.approx(true[0], rel=1e-5)
        assert one.exact == new[1]
        assert other.nll_new == pytest.approx(one.nll_new, rel=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_out_of_scope_keep_their_bits(family: str) -> None:
    case, _ = setting(family)
    before = score(case.editable, case.tokenizer, PROBES, max_tokens=1000)
    with routed(family, "hard") as (_, model):
        assert model.router is not None
        shares = model.router.routes([probe.prompt for probe in PROBES]).shares
        after = score(model, case.tokenizer, PROBES, max_tokens=1000)
    same = [one == other for one, other in zip(before, after, strict=True)]
    assert same == (shares == 0).tolist()
    assert {True, False} == set(same)


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_continuations_are_the_plain_ones(mode: Mode) -> None:
    with routed("llama", mode) as (case, model):
        found = generate(model, case.tokenizer, QUERIES, max_new_tokens=4, batch_tokens=1000)
        one_by_one = generate(model, case.tokenizer, QUERIES, max_new_tokens=4, batch_tokens=1)
    base = generate(case.editable, case.tokenizer, QUERIES, max_new_tokens=4, batch_tokens=1000)
    assert found == one_by_one
    assert found != base


def test_a_prompt_that_does_not_fit_behind_its_edit_is_refused() -> None:
    with routed("gpt2", "hard") as (case, model):
        assert model.router is not None
        routes = model.router.routes([ENTRIES[2].prompt])
        assert routes.taken == [0]
        answer = "the old museum " * 19
        width = len(case.tokenizer(" " + answer)["input_ids"])
        prompt = len(case.tokenizer(ENTRIES[2].prompt)["input_ids"])
        assert prompt + width <= 128 < prompt + width + len(routes.prefixes[0]) - 1
        with pytest.raises(InputError, match="the counterfactual model has 128 positions"):
            score(
                model,
                case.tokenizer,
                [Probe("case", "rewrite", 0, ENTRIES[2].prompt, answer, None)],
                max_tokens=1000,
            )


def test_states_without_a_share_are_not_computed_by_the_second_model() -> None:
    with routed("gpt2", "hard") as (case, model):
        assert model.router is not None
        second = model.router.routes(QUERIES).model
        calls: list[int] = []
        handle = second.base.register_forward_hook(lambda *_: calls.append(1))
        outside = [p for p in PROBES if p.prompt == QUERIES[2]]
        score(model, case.tokenizer, outside, max_tokens=1000)
        handle.remove()
    assert not calls


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_neutral_prompts_are_answered_as_they_are_routed(mode: Mode) -> None:
    case, editor = setting("gpt2")
    weights = EditedWeights(case.editable, (0,))
    change = MemoryAdapter.of(ENTRIES, editor.embed_edits(ENTRIES, 200))
    weights.apply(0, replace(change, router=router(editor, [], mode)))
    try:
        rows = measure(
            weights, case.tokenizer, [], QUERIES, text_tokens=None, batch_tokens=30, round=0
        )
    finally:
        weights.revert()
    found = {row["measure"]: row["value"] for row in rows}
    kl, same = 0.0, 0
    h = editor.counterfactual.model.model
    for query in QUERIES:
        edit, share = nearest("gpt2", mode)[query]
        both = [
            oracle.answer_probabilities(case.model, h, case.tokenizer, query, [], edit, one)
            for one in (0.0, share)
        ]
        kl += float((both[0] * (both[0].log() - both[1].log())).sum()) / len(QUERIES)
        same += int(both[0].argmax() == both[1].argmax())
    assert kl > 1e-3
    assert found["kl"] == pytest.approx(kl, rel=1e-4)
    assert found["same_argmax"] == pytest.approx(same / len(QUERIES))
    assert case.editable.router is None
