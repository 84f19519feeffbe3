"""Knowledge attribution against the plain loop, and what must hold of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.editing.attribution import AttributionSettings, attribute, scales
from pipeline.prompts import FactPrompts, tokenize_fact_prompts
from pipeline.requests import EditRequest
from tests.cases import EDITS, Case, case, fresh, relative_error, requests
from tests.oracles import knowledge_neurons as oracle

CONTEXTS = ["{}", "The house is old. {}"]
FAMILIES = ["gpt2", "gptj", "gpt_neox", "opt", "llama", "qwen2", "gemma2"]


def _facts(tiny: Case, *, with_old: bool = True) -> list[FactPrompts]:
    true = ["Spanish", "the violin", "London", "Ostrania the Great", "Berlin"]
    asked: list[EditRequest] = [
        request.model_copy(update={"target_true": answer, "paraphrase_prompts": ("It is in",)})
        for request, answer in zip(requests(EDITS), true, strict=True)
    ]
    return tokenize_fact_prompts(
        tiny.tokenizer, asked, CONTEXTS, paraphrases=True, with_old=with_old
    )


def _found(tiny: Case, facts: list[FactPrompts], max_tokens: int = 64, **settings: Any) -> Tensor:
    """All prompts of all facts: (prompts, L, F)."""
    layers = range(tiny.editable.num_blocks)
    given = AttributionSettings(**settings)
    found = attribute(tiny.editable, facts, layers, given, max_tokens=max_tokens)
    return torch.cat([attributions.scores for attributions in found])


def _plain(tiny: Case, facts: list[FactPrompts], alphas: Tensor, **measured: Any) -> Tensor:
    return torch.stack(
        [
            oracle.attribute(
                tiny.model, tiny.down_projections, prompt, fact.old or (), alphas.tolist(),
                **measured,
            )
            for fact in facts
            for prompt in fact.prompts
        ]
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_are_the_plain_loops(family: str) -> None:
    tiny = case(family)
    facts = [_facts(tiny)[2]]
    assert len(facts[0].prompts) == 3 and len(facts[0].old or ()) > 1
    found = _found(tiny, facts, steps=2)
    expected = _plain(tiny, facts, scales(2, "midpoint"))
    assert relative_error(found, expected) < 10 * tiny.tolerance


@pytest.mark.parametrize("quadrature", ["right", "left", "linspace"])
def test_the_published_quadratures(quadrature: Any) -> None:
    alphas = {"right": [0.25, 0.5, 0.75, 1], "left": [0, 0.25, 0.5, 0.75]}
    expected = alphas.get(quadrature, [0, 1 / 3, 2 / 3, 1])
    assert scales(4, quadrature).tolist() == pytest.approx(expected)
    tiny = case("gpt2")
    facts = _facts(tiny)[:1]
    found = _found(tiny, facts, steps=4, quadrature=quadrature)
    assert relative_error(found, _plain(tiny, facts, scales(4, quadrature))) < 1e-9


def test_passes_of_any_size_find_the_same() -> None:
    tiny = case("llama")
    facts = _facts(tiny)
    whole = _found(tiny, facts, max_tokens=4096, steps=4)
    assert relative_error(_found(tiny, facts, max_tokens=1, steps=4), whole) < 1e-9


def test_the_sum_is_what_the_answer_owes_to_a_blocks_neurons() -> None:
    tiny = case("llama")
    facts = [replace(_facts(tiny)[0], old=(223,))]
    owed = _owed(tiny, facts)

    def error(steps: int, quadrature: str) -> float:
        found = _found(tiny, facts, steps=steps, quadrature=quadrature).sum(-1)
        return float((found - owed).abs().max())

    assert error(20, "midpoint") < 0.05 * float(owed.abs().max())
    # The midpoint rule is of second order, the paper's of first.
    assert error(200, "midpoint") < error(20, "midpoint") / 50
    assert error(200, "right") > 10 * error(200, "midpoint")


def _owed(tiny: Case, facts: list[FactPrompts]) -> Tensor:
    """P(w) - P(0) of every prompt and block, for answers of one token."""
    found = []
    for fact in facts:
        for ids in fact.prompts:
            (token,), place = fact.old or (), len(ids) - 1
            for down in tiny.down_projections:
                given = oracle.module_input(tiny.model, down, list(ids))[place]
                full, empty = (
                    oracle.measured_with(tiny.model, down, ids, place, token, scale * given)
                    for scale in (1.0, 0.0)
                )
                found.append(full - empty)
    return torch.stack(found).view(-1, len(tiny.down_projections)).detach()


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_of_a_linear_readout_the_attribution_is_exact(steps: int) -> None:
    tiny = fresh("gpt2")
    # Without its final norm, this model's logit is linear in the last block's neurons.
    tiny.model.transformer.ln_f = nn.Identity()
    facts = _facts(tiny)[:2]
    found = _found(tiny, facts, steps=steps, measure="logit")[:, -1]
    exact = _plain(tiny, facts, torch.tensor([1.0]), measured=oracle.logit)[:, -1]
    assert relative_error(found, exact) < 1e-12


def test_without_an_answer_it_is_the_models_own() -> None:
    tiny = case("qwen2")
    facts = _facts(tiny, with_old=False)
    settings = AttributionSettings(steps=2)
    found = list(attribute(tiny.editable, facts, [0, 2], settings, max_tokens=64))
    for fact, attributions in zip(facts, found, strict=True):
        logits = tiny.model(input_ids=torch.tensor([fact.prompts[0]])).logits[0, -1]
        assert attributions.answer == (int(logits.argmax()),)
        assert attributions.scores.shape == (3, 2, tiny.editable.key_size(0))
