"""SERAC for a T5: classifier, counterfactual model, scores and the served model, asked plainly."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from pipeline.editing.serac.editor import SeracEditor
from pipeline.editing.serac.router import Mode
from pipeline.editing.serac.serving import SeracAnswerModel
from pipeline.editing.serac.training import Example, LossSettings, losses
from pipeline.errors import InputError
from pipeline.evaluation.generation import generate
from pipeline.evaluation.probes import Probe
from pipeline.evaluation.scoring import score
from pipeline.methods.serac import new_editor
from pipeline.models.editable import EditableModel
from pipeline.models.encoder_decoder import editable_model
from pipeline.models.first_blocks import first_blocks, first_encoder_blocks
from pipeline.spec.trained import SeracSpec
from tests.editing.serac.cases import ENTRIES, QUERIES, router, setting
from tests.encoder_decoders import KINDS, build, save, tokenizer
from tests.oracles import serac as oracle

NEW = 5
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
ANSWERS = ["the", "Port Velmora", "French", "the violin of Rome, in the north"]
PROBES = [
    Probe("case", "rewrite", i, query, ANSWERS[i % 4], ANSWERS[(i + 1) % 4])
    for i, query in enumerate(QUERIES)
]
EXAMPLES = [
    Example(entry.prompt, entry.target, QUERIES[i], QUERIES[(i + 2) % 5])
    for i, entry in enumerate(ENTRIES)
]


def _embedding(editor: SeracEditor, ids: list[int]) -> Tensor:
    head = editor.encoder.head
    assert head is not None
    with torch.no_grad():
        states = editor.encoder.trunk(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return head.weight.double() @ states.double().mean(dim=0)


def _stored(number: int) -> oracle.Stored:
    return oracle.Stored(ENTRIES[number].prompt, ENTRIES[number].target)


class Plain:
    """Who answers a query, and how likely its next token is, from single passes."""

    def __init__(self, kind: str, mode: Mode) -> None:
        case, editor = setting(kind)
        self.base, self.h = case.editable.model, editor.counterfactual.model.model
        edits = [_embedding(editor, oracle.edit_texts(tokenizer(), _stored(i))) for i in range(4)]
        self.nearest: dict[str, tuple[oracle.Stored, float]] = {}
        for query in QUERIES:
            asked = _embedding(editor, tokenizer()(query)["input_ids"])
            shares = [oracle.scope(edit, asked, editor.scale) for edit in edits]
            best = max(range(4), key=shares.__getitem__)
            share = shares[best] if mode == "soft" else float(shares[best] > 0.5)
            self.nearest[query] = _stored(best), share

    def chances(self, query: str, answered: list[int]) -> Tensor:
        edit, share = self.nearest[query]
        given = self.base, self.h, tokenizer(), query, answered
        return oracle.decoder_probabilities(*given, edit, share)

    def judge(self, query: str, answer: str) -> tuple[float, bool]:
        ids, nll, exact = tokenizer()(answer)["input_ids"], 0.0, True
        for place, token in enumerate(ids):
            chances = self.chances(query, ids[:place])
            nll -= float(chances[token].log())
            exact = exact and int(chances.argmax()) == token
        return nll / len(ids), exact

    def answer(self, query: str) -> list[int]:
        ids: list[int] = []
        while len(ids) < NEW and tokenizer().eos_token_id not in ids:
            ids.append(int(self.chances(query, ids).argmax()))
        return ids


@contextmanager
def _routed(kind: str, mode: Mode) -> Iterator[EditableModel]:
    case, editor = setting(kind)
    case.editable.router = router(editor, mode=mode)
    try:
        yield case.editable
    finally:
        case.editable.router = None


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_single_texts(kind: str) -> None:
    _, editor = setting(kind)
    rows = editor.encoder.edit_ids([e.prompt for e in ENTRIES], [e.target for e in ENTRIES])
    assert rows == [oracle.edit_texts(tokenizer(), _stored(i)) for i in range(4)]
    rows += editor.encoder.query_ids(QUERIES)
    expected = torch.stack([_embedding(editor, row) for row in rows])
    for max_tokens in (1000, 20):
        found = editor.encoder.embed(rows, max_tokens)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_the_plain_ones(kind: str) -> None:
    """Both halves of h learn, and the classifier's encoder."""
    _, editor = setting(kind)
    h, words = editor.counterfactual.model.model, tokenizer()
    module = editor.module
    try:
        found = losses(editor, EXAMPLES, LossSettings(1.0, 0.0), 100)
        of_h = dict(h.named_parameters())
        mine = torch.autograd.grad(found.total, list(of_h.values()))
        nlls = []
        for number, example in enumerate(EXAMPLES):
            source = oracle.edit_texts(words, _stored(number)) + words(example.inside)["input_ids"]
            answer = words(example.target)["input_ids"]
            likely = oracle.decoder_logits(h, source, answer[:-1]).log_softmax(-1)
            nlls.append(-likely[range(len(answer)), answer].mean())
        expected = torch.stack(nlls).mean()
        assert float(found.edit) == pytest.approx(float(expected.detach()), rel=1e-9)
        for name, one, other in zip(
            of_h, mine, torch.autograd.grad(expected, list(of_h.values())), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10, msg=name)
            assert float(one.norm()) > 0, name
    finally:
        module.requires_grad_(False)


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_answers_are_the_plain_ones(kind: str, mode: Mode) -> None:
    plain, words = Plain(kind, mode), tokenizer()
    assert {0.0, 1.0} == {share for _, share in plain.nearest.values()} or mode == "soft"
    with _routed(kind, mode) as model:
        for max_tokens in (1000, 30):
            found = score(model, words, PROBES, max_tokens=max_tokens)
            for probe, one in zip(PROBES, found, strict=True):
                assert probe.target_new and probe.target_true
                nll, exact = plain.judge(probe.prompt, probe.target_new)
                assert (one.nll_new, one.exact) == (pytest.approx(nll, rel=1e-5), exact)
                nll, _ = plain.judge(probe.prompt, probe.target_true)
                assert one.nll_true == pytest.approx(nll, rel=1e-5)
        expected = [words.decode(plain.answer(q), skip_special_tokens=True) for q in QUERIES]
        for size in (1, 1000):
            given = {"max_new_tokens": NEW, "batch_tokens": size}
            assert generate(model, words, QUERIES, **given) == expected


def _given(side: str = "right") -> dict[str, Any]:
    encoded = tokenizer()(QUERIES, padding=True, padding_side=side, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_the_served_model_answers_as_the_plain_ones(mode: Mode) -> None:
    (case, editor), plain = setting("t5_gated"), Plain("t5_gated", mode)
    base, words = case.editable.model, tokenizer()
    model = SeracAnswerModel(case.editable, router(editor, mode=mode), words)
    answers = words(["Port Velmora"] * 5, return_tensors="pt")["input_ids"]
    output = model(**_given(), labels=answers)
    with torch.no_grad():
        alone = base(**_given(), labels=answers).logits
    nlls = [plain.judge(query, "Port Velmora")[0] for query in QUERIES]
    assert float(output.loss) == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)
    for number, query in enumerate(QUERIES):
        if plain.nearest[query][1] == 0:
            assert torch.equal(output.logits[number], alone[number])
        chances = plain.chances(query, answers[number, :-1].tolist())
        torch.testing.assert_close(
            output.logits[number, -1].softmax(-1), chances, rtol=1e-5, atol=1e-9
        )
    # The cache that transformers makes has as many layers as the encoder, which is shallower here.
    assert len(base.encoder.block) < len(base.decoder.block)
    kinds = ({}, {"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)})
    for side, kind in itertools.product(("left", "right"), kinds):
        ids = model.generate(**_given(side), **{**GREEDY, **kind})
        for row, query in zip(ids[:, 1:].tolist(), QUERIES, strict=True):
            expected = plain.answer(query)
            assert row[: len(expected)] == expected
    many = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    beams = model.generate(**_given(), **many)
    assert len(beams) == 2 * len(QUERIES)
    assert torch.equal(beams, model.generate(**_given(), **many, use_cache=False))
    with pytest.raises(ValueError, match="whole rows"):
        model(**_given(), labels=answers, past_key_values=object())


def test_with_an_empty_memory_it_is_the_base_model_to_the_bit() -> None:
    case, editor = setting("t5")
    model = SeracAnswerModel(case.editable, router(editor, []), tokenizer())
    labels = tokenizer()(ANSWERS[1:2] * 5, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = case.editable.model(**_given(), labels=labels)
    found = model(**_given(), labels=labels)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    cache = case.editable.new_cache()
    ids = case.editable.model.generate(**_given(), **GREEDY, **cache)
    assert torch.equal(model.generate(**_given(), **GREEDY), ids)
    # A cache of one's own is taken, and filled.
    own = case.editable.new_cache()
    assert torch.equal(model.generate(**_given(), **GREEDY, **own), ids)
    assert all(cache.get_seq_length() == NEW for cache in own.values())


def test_a_t5_can_be_named_for_both_models(tmp_path: Path) -> None:
    save("t5_gated", tmp_path)
    model = editable_model(build("t5_gated", torch.float32))
    spec = SeracSpec(classifier=str(tmp_path), counterfactual=str(tmp_path))
    editor = new_editor(spec, model, tokenizer())
    assert editor.encoder.head is None and editor.encoder.size == 32
    assert not hasattr(editor.encoder.trunk, "decoder")
    (found,) = editor.encoder.embed(editor.encoder.query_ids(QUERIES[:1]), 100)
    with torch.no_grad():
        asked = tokenizer()(QUERIES[0], return_tensors="pt")
        expected = model.encoder(**asked).last_hidden_state[0].mean(dim=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    h = editor.counterfactual.model.model
    assert h is not model.model and torch.equal(h.lm_head.weight, model.model.lm_head.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_blocks_compute_what_they_did(kind: str) -> None:
    whole = build(kind)
    shorter, alone = first_blocks(whole, 2), first_encoder_blocks(whole, 2)
    assert (len(shorter.encoder.block), len(shorter.decoder.block)) == (2, 2)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        states = whole.encoder(input_ids=ids, output_hidden_states=True).hidden_states[2]
        expected = whole.encoder.final_layer_norm(states)
        assert torch.equal(alone(input_ids=ids).last_hidden_state, expected)
        assert torch.equal(shorter.encoder(input_ids=ids).last_hidden_state, expected)
        same = first_blocks(whole)
        tied = same.shared.weight is same.lm_head.weight
        assert tied == (whole.shared.weight is whole.lm_head.weight) == (kind == "t5")
        asked = {"input_ids": ids, "decoder_input_ids": ids}
        assert torch.equal(same(**asked).logits, whole(**asked).logits)
    with pytest.raises(InputError, match="cannot keep 4 blocks of a model that has an encoder of"):
        first_blocks(whole, 4)
    with pytest.raises(InputError, match="cannot keep 4 blocks of a model that has an encoder of"):
        first_encoder_blocks(whole, 4)
