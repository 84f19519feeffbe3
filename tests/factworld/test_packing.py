"""Training rows: whole sentences, weighted objects, and subjects seen by their last token only."""

from itertools import islice

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.factworld import World, corpus, make_world
from pipeline.factworld.build import Part, training_statements
from pipeline.factworld.hops import HOPS
from pipeline.factworld.packing import (
    NO_SUBJECT,
    ROW_LENGTHS,
    Batch,
    Sentence,
    batches,
    encode,
)
from pipeline.factworld.questions import Statement
from pipeline.factworld.train import _attention_mask, train_tokenizer


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0, entities_per_kind=30)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus(world), 768)


@pytest.fixture(scope="module")
def statements(world: World) -> list[Statement]:
    return training_statements(world, Part(1, hops=2, one_hop=1, reversed=3))


@pytest.fixture(scope="module")
def sentences(
    world: World, statements: list[Statement], tokenizer: PreTrainedTokenizerFast
) -> list[Sentence]:
    return encode(statements, world, tokenizer)


@pytest.fixture(scope="module")
def made(sentences: list[Sentence], tokenizer: PreTrainedTokenizerFast) -> list[Batch]:
    return list(islice(batches(sentences, tokenizer, 0), 6))


def test_sentences_are_the_tokens_of_the_corpus(
    world: World,
    statements: list[Statement],
    sentences: list[Sentence],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    said = {tuple(ids) for ids in tokenizer(corpus(world))["input_ids"]}
    assert {tuple(sentence.ids) for sentence in sentences} == said
    for statement, sentence in zip(statements, sentences, strict=True):
        answer = sentence.ids[-sentence.num_answer_tokens :]
        assert tokenizer.decode(answer) == f" {statement.answer}"
        if statement.subject is None:
            assert sentence.subject == NO_SUBJECT
            continue
        subject = sentence.ids[sentence.subject_start : sentence.subject_end + 1]
        assert tokenizer.decode(subject) == f" {world.subjects[sentence.subject]}"
        assert world.subjects[sentence.subject] == statement.subject


def test_answers_weigh_most(
    world: World, tokenizer: PreTrainedTokenizerFast, made: list[Batch]
) -> None:
    objects = {f" {o}" for r in world.relations.values() for o in r.objects}
    values = {f" {value}" for hop in HOPS.values() for value in hop.values}
    answers = {*objects, *values, *(f" {subject}" for subject in world.subjects)}
    for batch in made:
        row, weights = batch.ids[0].tolist(), batch.weights[0].tolist()
        start = end = weights.index(1.0)
        while weights[end] == 1.0:
            end += 1
        assert tokenizer.decode(row[start:end]) in answers
        assert tokenizer.decode([row[end]]) == "."


def test_rows_start_alone_or_after_end_of_text(
    tokenizer: PreTrainedTokenizerFast, made: list[Batch]
) -> None:
    assert [batch.ids.shape[1] for batch in made] == [*ROW_LENGTHS, *ROW_LENGTHS]
    for batch in made:
        assert {tensor.shape for tensor in batch} == {batch.ids.shape}
    starts = torch.cat([batch.ids[:, 0] == tokenizer.eos_token_id for batch in made])
    assert 0.2 < starts.float().mean() < 0.8


def test_in_veiled_rows_only_the_last_token_of_a_subject_is_seen_from_behind(
    made: list[Batch],
) -> None:
    for batch in made:
        mask = _attention_mask(batch.visible_until)[:, 0]
        seen = mask == 0
        length = batch.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        veiled = (batch.visible_until < length).any(dim=1)
        assert veiled.any() and not veiled.all()
        assert torch.equal(seen[~veiled], causal.expand(int((~veiled).sum()), -1, -1))
        assert not (seen & ~causal).any()
        assert seen.diagonal(dim1=1, dim2=2).all()
        for row, column in (batch.visible_until < length).nonzero().tolist():
            last = int(batch.visible_until[row, column])
            assert seen[row, column : last + 1, column].all()
            assert not seen[row, last + 1 :, column].any()
            if last < length:
                assert batch.subjects[row, last] != NO_SUBJECT
                assert seen[row, last:, last].all()
