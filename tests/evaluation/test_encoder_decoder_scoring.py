"""Scores and answers of many probes to a T5 at once, against one at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import packing
from pipeline.evaluation.generation import generate
from pipeline.evaluation.metrics import Score
from pipeline.evaluation.probes import Kind, Probe
from pipeline.evaluation.scoring import score
from pipeline.models.encoder_decoder import EncoderDecoderModel
from tests import encoder_decoders
from tests.oracles import encoder_decoder as oracle

KINDS = list(encoder_decoders.KINDS)
PROMPTS = [
    "The",
    "The capital of Ostrania is",
    "They said that the mother tongue of Marguerite Oduya, who was born in Rome, is",
]
ANSWERS = ["the", "Port", "Port Velmora", " French", "the violin of Rome, in the north"]


def _probes() -> list[Probe]:
    kinds: list[Kind] = ["rewrite", "paraphrase", "neighborhood"]
    pairs = [(new, true) for new in ANSWERS for true in ANSWERS if new != true]
    both = [
        Probe("case", kinds[i % 3], i, PROMPTS[i % len(PROMPTS)], new, true)
        for i, (new, true) in enumerate(pairs)
    ]
    return [*both, Probe("case", "locality", 0, PROMPTS[1], None, "Port Velmora"), both[3]]


def _plain(model: EncoderDecoderModel, probe: Probe) -> Score:
    new, true = (
        None
        if answer is None
        else oracle.judge(model.model, encoder_decoders.tokenizer(), probe.prompt, answer)
        for answer in (probe.target_new, probe.target_true)
    )
    success = None
    if new and true:
        wins, loses = (true, new) if probe.kind == "neighborhood" else (new, true)
        success = wins.nll < loses.nll
    wanted = true if probe.kind in ("neighborhood", "locality") else new
    assert wanted is not None
    return Score(new and new.nll, true and true.nll, success, wanted.exact)


def _assert_same(found: list[Score], expected: list[Score]) -> None:
    for one, other in zip(found, expected, strict=True):
        for mine, plain in ((one.nll_new, other.nll_new), (one.nll_true, other.nll_true)):
            assert mine == (None if plain is None else pytest.approx(plain, rel=1e-9))
        assert (one.success, one.exact) == (other.success, other.exact)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_one_answer_at_a_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, probes = encoder_decoders.case(kind), encoder_decoders.tokenizer(), _probes()
    expected = [_plain(model, one) for one in probes]
    for max_tokens in (1, 60, 100_000):
        _assert_same(score(model, tokenizer, probes, max_tokens=max_tokens), expected)
    monkeypatch.setattr(packing, "ANSWER_TOKENS", 0)
    _assert_same(score(model, tokenizer, probes, max_tokens=100), expected)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PROMPTS),
            st.text("aeio Rm.ěč", min_size=1, max_size=8).filter(str.strip),
            st.text("PQst u.", min_size=1, max_size=8).filter(str.strip) | st.none(),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 80),
)
def test_any_probes_in_any_batches(
    cases: list[tuple[str, str, str | None]], max_tokens: int
) -> None:
    model = encoder_decoders.case("t5")
    probes = [Probe("case", "rewrite", 0, *case) for case in cases]
    found = score(model, encoder_decoders.tokenizer(), probes, max_tokens=max_tokens)
    _assert_same(found, [_plain(model, one) for one in probes])


def test_a_prompt_is_encoded_once_for_all_its_answers() -> None:
    model, tokenizer = encoder_decoders.case("t5_gated"), encoder_decoders.tokenizer()
    probes = [Probe("a", "rewrite", 0, PROMPTS[1], new, "Rome") for new in ANSWERS] * 2
    seen: list[torch.Size] = []
    hooks = [
        stack.block[0].register_forward_hook(lambda _m, given, _o: seen.append(given[0].shape))
        for stack in (model.encoder, model.base)
    ]
    score(model, tokenizer, probes, max_tokens=1000)
    for hook in hooks:
        hook.remove()
    inner = sum(len(tokenizer(answer)["input_ids"]) - 1 for answer in {*ANSWERS, "Rome"})
    prompt = len(tokenizer(PROMPTS[1])["input_ids"])
    assert [shape[:2] for shape in seen] == [(1, prompt), (1, 1 + inner)]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_to_single_prompts(kind: str) -> None:
    model, tokenizer = encoder_decoders.case(kind), encoder_decoders.tokenizer()
    expected = [oracle.answered(model.model, tokenizer, prompt, 10) for prompt in PROMPTS]
    for size in (1, 1000):
        found = generate(model, tokenizer, PROMPTS, max_new_tokens=10, batch_tokens=size)
        assert found == expected
    assert any(expected)
