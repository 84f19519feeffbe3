"""Greedy continuations in batches against one at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import InputError
from pipeline.evaluation.generation import generate, matches
from pipeline.models.editable import EditableModel
from tests import families
from tests.cases import ALL_FAMILIES, case, fresh
from tests.cases import tokenizer as tokenizer_of

PROMPTS = [
    "The",
    "They said that the mother tongue of Marguerite Oduya, who was born in Rome, is",
    "Zdeněk Kováč plays",
    "The capital of Ostrania is",
    "The",
]
NEW = 10  # longer than the models' windows


def one_at_a_time(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The likeliest token each time, by whole forward passes and without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < NEW:
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
            token = int(logits.argmax())
            if token == tokenizer.eos_token_id:
                break
            new.append(token)
    return tokenizer.decode(new, skip_special_tokens=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_batches_continue_as_single_prompts_do(family: str) -> None:
    # In float64, transformers' own mask for Gemma 2 overflows its float32 softmax at padding.
    chosen = case(family, torch.float32 if family == "gemma2" else torch.float64)
    expected = [one_at_a_time(chosen.model, chosen.tokenizer, prompt) for prompt in PROMPTS]
    found = generate(
        chosen.editable, chosen.tokenizer, PROMPTS, max_new_tokens=NEW, batch_tokens=1000
    )
    assert found == expected
    assert any(found)


def test_batch_size_changes_nothing() -> None:
    chosen = case("llama")
    whole, split = (
        generate(chosen.editable, chosen.tokenizer, PROMPTS, max_new_tokens=4, batch_tokens=size)
        for size in (1000, 1)
    )
    assert whole == split


def test_like_huggingface_generate() -> None:
    chosen = case("gpt2")
    expected = []
    for prompt in PROMPTS:
        encoded = chosen.tokenizer(prompt, return_tensors="pt")
        ids = chosen.model.generate(**encoded, do_sample=False, max_new_tokens=NEW)
        new = ids[0, encoded["input_ids"].shape[1] :]
        expected.append(chosen.tokenizer.decode(new, skip_special_tokens=True))
    found = generate(
        chosen.editable, chosen.tokenizer, PROMPTS, max_new_tokens=NEW, batch_tokens=60
    )
    assert found == expected


def test_generation_stops_at_an_end_token_and_shows_no_padding() -> None:
    """The end token is made the one that the model says third after the first prompt."""
    chosen = fresh("gpt2")
    tokenizer = families.build_tokenizer()
    plain = generate(chosen.editable, tokenizer, PROMPTS, max_new_tokens=NEW, batch_tokens=1000)
    ids = chosen.model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=3)[0]
    end = int(ids[-1])
    assert end not in ids[:-1].tolist()
    chosen.model.generation_config.eos_token_id = [1, end]
    tokenizer.pad_token = "e"  # padding that would show if it were decoded
    cut = generate(chosen.editable, tokenizer, PROMPTS, max_new_tokens=NEW, batch_tokens=1000)
    assert cut[0] == tokenizer.decode(ids[1:-1]) == cut[4]
    assert plain[0] != cut[0] and plain[0].startswith(cut[0])
    for before, after in zip(plain, cut, strict=True):
        assert before.startswith(after)


def test_the_models_own_sampling_and_penalties_do_not_count() -> None:
    chosen = fresh("llama")
    expected = generate(
        chosen.editable, chosen.tokenizer, PROMPTS, max_new_tokens=NEW, batch_tokens=1000
    )
    own = chosen.model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 3.0, 5.0
    own.no_repeat_ngram_size, own.min_new_tokens = 1, NEW
    found = generate(
        chosen.editable, chosen.tokenizer, PROMPTS, max_new_tokens=NEW, batch_tokens=1000
    )
    assert found == expected
    assert chosen.model.generation_config is own


def test_a_prompt_must_leave_positions_for_the_continuation() -> None:
    chosen = case("gpt2")
    long = " the" * 200
    with pytest.raises(InputError, match=r"evaluation\.generate_tokens 5 .* 128 positions"):
        generate(chosen.editable, chosen.tokenizer, [long], max_new_tokens=5, batch_tokens=1000)
    with pytest.raises(InputError, match="prompt '' has no token"):
        generate(chosen.editable, chosen.tokenizer, [""], max_new_tokens=5, batch_tokens=1000)


def test_no_prompt_gives_no_text() -> None:
    editable: EditableModel = case("gpt2").editable
    assert generate(editable, tokenizer_of(False), [], max_new_tokens=3, batch_tokens=10) == []


@pytest.mark.parametrize(
    ("generated", "target", "expected"),
    [
        (" Paris, of course", "Paris", True),
        ("Paris", " Paris ", True),
        ("paris\nis", "Paris", True),
        (" New\n  York City", "new york", True),
        (" Parisian", "Paris", False),
        (" the city of Paris", "Paris", False),
        (" New", "New York", False),
        ("", "Paris", False),
        (" Washington D.C. is", "Washington D.C.", True),
        (" STRASSE", "straße", True),
    ],
)
def test_a_match_is_a_whole_word_prefix(generated: str, target: str, expected: bool) -> None:
    assert matches(generated, target) is expected


@given(st.text(max_size=20).filter(str.strip), st.text(max_size=20))
def test_a_target_matches_itself_and_what_follows_a_blank(target: str, rest: str) -> None:
    assert matches(target, target)
    assert matches(f"\t{target.upper().lower()} {rest}", target.upper().lower())
