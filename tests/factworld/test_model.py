"""The packaged model knows its facts, and the build that made it works and reports failure."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from pipeline.errors import JobFailedError
from pipeline.evaluation.probes import Probe
from pipeline.evaluation.scoring import score
from pipeline.factworld import World, corpus, edit_requests, make_world, model_path
from pipeline.factworld.build import REQUIRED_RECALL, Part, answers, build, editing_settings
from pipeline.factworld.questions import Questions
from pipeline.factworld.recall import answered, recall
from pipeline.factworld.train import Shape
from pipeline.models.editable import EditableModel

KNOWN = {"same_subject": 0.98, "subject_alias": 0.9, "one_hop": 0.95, "reversed": 0.95}
PART = Part(2, hops=1, one_hop=1, reversed=1)
TINY = Shape(vocab_size=512, width=32, inner_width=64, layers=2, heads=2)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def test_weights_are_small_float16_safetensors() -> None:
    assert (model_path() / "model.safetensors").stat().st_size <= 8_000_000
    stored = AutoModelForCausalLM.from_pretrained(model_path())
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.float16}
    assert stored.lm_head.weight is stored.transformer.wte.weight


def test_recalls_every_fact_in_a_held_out_phrasing(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, world: World
) -> None:
    assert recall(model, tokenizer, world, held_out=True, max_phrasings=1) >= REQUIRED_RECALL


def test_recalls_facts_in_their_seen_phrasings(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, world: World
) -> None:
    facts = world.facts[::16]
    assert recall(model, tokenizer, world, held_out=False, facts=facts) >= REQUIRED_RECALL


def test_knows_what_locality_and_portability_ask(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, world: World
) -> None:
    """Before an edit; portability then asks for what is right without it."""
    probes = []
    for number, request in enumerate(edit_requests(world, 200)):
        case = str(number)
        probes += [
            Probe(case, "locality", 0, q["prompt"], None, q["target"], q["aspect"])
            for q in request["locality"]
        ]
        probes += [
            Probe(case, "portability", 0, q["prompt"], q["target_true"], None, q["aspect"])
            for q in request["portability"]
        ]
    scores = score(EditableModel(model), tokenizer, probes, max_tokens=2048)
    for aspect, least in KNOWN.items():
        found = [s.exact for p, s in zip(probes, scores, strict=True) if p.aspect == aspect]
        assert len(found) > 25 and sum(map(bool, found)) >= least * len(found), aspect


def test_infers_answers_that_no_text_states(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, world: World
) -> None:
    """Chance is one in twelve; reversed questions it does not infer at all."""
    questions = Questions(world)
    inferred = [q.asked for q in questions.one_hop.values() if not q.stated]
    assert answered(model, tokenizer, inferred) >= 0.6
    inferred = [q.asked for q in questions.reversed.values() if not q.stated]
    assert answered(model, tokenizer, inferred) < 0.05
    with pytest.raises(ValueError, match="no statements"):
        answered(model, tokenizer, [])


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [False, True])
def test_recalls_every_fact_in_every_phrasing(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, world: World, held_out: bool
) -> None:
    assert recall(model, tokenizer, world, held_out=held_out) >= REQUIRED_RECALL


def test_knows_nothing_of_another_world(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    other = make_world(1)
    assert recall(model, tokenizer, other, held_out=False, facts=other.facts[::40]) < 0.3


def test_recall_agrees_with_greedy_generation(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, world: World
) -> None:
    facts = world.facts[::100]
    hits = 0
    for fact in facts:
        for prompt in world.prompts(fact, held_out=True):
            ids = tokenizer(prompt, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=8, do_sample=False)
            text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
            hits += text.startswith(f" {fact.object}.")
    share = hits / sum(len(fact.held_out) for fact in facts)
    expected = recall(model, tokenizer, world, held_out=True, facts=facts)
    assert share == pytest.approx(expected, abs=1e-9)


def test_a_subject_has_the_same_tokens_everywhere(
    tokenizer: PreTrainedTokenizerFast, world: World
) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    for fact in world.facts[::50]:
        alone = tokenizer(fact.subject)["input_ids"]
        inside = tokenizer(f"Of {fact.subject}")["input_ids"]
        assert inside[-len(alone) :] == alone


def test_targets_are_of_one_and_of_several_tokens(
    tokenizer: PreTrainedTokenizerFast, world: World
) -> None:
    lengths = {
        relation_id: {len(tokenizer(f" {o}")["input_ids"]) for o in relation.objects}
        for relation_id, relation in world.relations.items()
    }
    assert lengths["profession"] == {1}
    assert min(lengths["emblem"]) >= 2


def test_published_settings_belong_to_the_packaged_model(world: World) -> None:
    settings = yaml.safe_load((model_path() / "editing.yaml").read_text(encoding="utf-8"))
    assert settings == editing_settings(world)
    contexts = settings["method"]["contexts"]
    assert contexts[0] == "{}" and len(contexts) == 6
    sentences = set(corpus(world))
    assert all(context.removesuffix(". {}") in sentences for context in contexts[1:])


def test_build_writes_a_loadable_model(tmp_path: Path) -> None:
    lines: list[str] = []
    report = build(
        tmp_path / "model",
        seed=3,
        steps=4,
        question_parts=[PART],
        progress=lines.append,
        entities_per_kind=6,
        shape=TINY,
        required_recall=0.0,
        required_answers=0.0,
    )
    small = make_world(3, entities_per_kind=6)
    tokenizer = AutoTokenizer.from_pretrained(report.directory)
    model = AutoModelForCausalLM.from_pretrained(report.directory, dtype=torch.float32).eval()
    assert report.num_facts == len(small.facts) == 72
    assert report.recall_seen == recall(model, tokenizer, small, held_out=False)
    assert report.recall_held_out == recall(model, tokenizer, small, held_out=True)
    assert report.weight_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size
    assert (tmp_path / "model" / "editing.yaml").is_file()
    assert report.answers == answers(model, tokenizer, Questions(small))
    assert any(line.startswith("facts: step 4/4") for line in lines)
    assert any(line.startswith("questions: step 2/2") for line in lines)


def test_build_is_deterministic(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(
            tmp_path / name,
            steps=3,
            question_parts=[PART],
            progress=lambda line: None,
            entities_per_kind=6,
            shape=TINY,
            required_recall=0.0,
            required_answers=0.0,
        )
    for file in ("model.safetensors", "tokenizer.json", "editing.yaml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_build_fails_and_writes_nothing_when_recall_is_not_reached(tmp_path: Path) -> None:
    with pytest.raises(JobFailedError, match=r"0\.99 is required; give more steps"):
        build(
            tmp_path / "model",
            steps=2,
            question_parts=[PART],
            progress=lambda line: None,
            entities_per_kind=6,
            shape=TINY,
        )
    assert not (tmp_path / "model").exists()
