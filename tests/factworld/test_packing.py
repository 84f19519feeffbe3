"""Training rows: whole sentences, weighted objects, and subjects seen by their last token only."""

from itertools import islice

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline.factworld import World, corpus, make_world
from pipeline.factworld.packing import NO_SUBJECT, ROW_LENGTHS, Batch, batches, encode_facts
from pipeline.factworld.train import _attention_mask, train_tokenizer


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0, entities_per_kind=30)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> PreTrainedTokenizerFast:
    return train_tokenizer(corpus(world), 768)


@pytest.fixture(scope="module")
def made(world: World, tokenizer: PreTrainedTokenizerFast) -> list[Batch]:
    return list(islice(batches(encode_facts(world, tokenizer), tokenizer, 0), 6))


def test_sentences_are_the_tokens_of_the_corpus(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    sentences = encode_facts(world, tokenizer)
    assert sorted(s.ids for s in sentences) == sorted(tokenizer(corpus(world))["input_ids"])
    for sentence in sentences:
        subject = sentence.ids[sentence.subject_start : sentence.subject_end + 1]
        assert tokenizer.decode(subject) == f" {world.subjects[sentence.subject]}"


def test_objects_weigh_most(
    world: World, tokenizer: PreTrainedTokenizerFast, made: list[Batch]
) -> None:
    objects = {f" {o}" for r in world.relations.values() for o in r.objects}
    for batch in made:
        row, weights = batch.ids[0].tolist(), batch.weights[0].tolist()
        start = end = weights.index(1.0)
        while weights[end] == 1.0:
            end += 1
        assert tokenizer.decode(row[start:end]) in objects
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
