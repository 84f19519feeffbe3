"""Turn the facts of a world into batches of packed rows of tokens for training."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pipeline.factworld.questions import Statement
from pipeline.factworld.world import World

TOKENS_PER_STEP = 1024
ROW_LENGTHS = (32, 64, 128)
# Most of a sentence (which subject, which phrasing) cannot be predicted: it only adds noise.
OTHER_TOKEN_WEIGHT = 0.1
VEILED_SHARE = 0.75
NO_SUBJECT = -1


@dataclass(frozen=True)
class Sentence:
    """Token ids of one statement, ending with the answer.

    The subject, number `subject` of the world, is `ids[subject_start : subject_end + 1]`; a
    statement that is about none has `NO_SUBJECT`.
    """

    ids: list[int]
    num_answer_tokens: int
    subject: int
    subject_start: int
    subject_end: int


class Batch(NamedTuple):
    """A batch of rows; every tensor is (B, T).

    `weights` is the loss weight of each token; `subjects` has the subject's number at the last
    token of a subject and `NO_SUBJECT` elsewhere; token j is seen from positions up to
    `visible_until[j]`.
    """

    ids: Tensor
    weights: Tensor
    subjects: Tensor
    visible_until: Tensor


def encode(
    statements: Sequence[Statement], world: World, tokenizer: PreTrainedTokenizerFast
) -> list[Sentence]:
    """Tokenize statements; subjects are numbered as in `world.subjects`."""
    numbers = {subject: number for number, subject in enumerate(world.subjects)}

    def ids(text: str) -> list[int]:
        return tokenizer(text)["input_ids"] if text else []

    sentences = []
    for template, subject, answer in statements:
        # Tokens never cross a space, so that the parts can be tokenized one by one.
        target = ids(answer)
        if subject is None:
            sentences.append(Sentence(ids(template) + target, len(target), NO_SUBJECT, 0, 0))
            continue
        prefix, suffix = (ids(part.strip()) for part in template.split("{}"))
        name = ids(subject)
        sentences.append(
            Sentence(
                ids=prefix + name + suffix + target,
                num_answer_tokens=len(target),
                subject=numbers[subject],
                subject_start=len(prefix),
                subject_end=len(prefix) + len(name) - 1,
            )
        )
    return sentences


def batches(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[Batch]:
    """Yield batches of packed rows for ever.

    A row starts with a sentence alone or after an end-of-text token and goes on as running text;
    short rows make the first case as common as the last. In most rows only the last token
    of a subject can be seen from behind it (see `visible_until`).
    """
    rng = random.Random(seed)
    stream = _endless(sentences, rng)
    stop_id, eos_id = tokenizer(".")["input_ids"][-1], tokenizer.eos_token_id
    while True:
        for length in ROW_LENGTHS:
            rows = [_Row(length) for _ in range(TOKENS_PER_STEP // length)]
            for row in rows:
                _fill(row, stream, stop_id, eos_id, rng)
            yield Batch(
                torch.tensor([row.ids[:length] for row in rows]),
                torch.tensor([row.weights[:length] for row in rows]),
                torch.tensor([row.subjects[:length] for row in rows]),
                torch.tensor([row.visible_until[:length] for row in rows]),
            )


class _Row:
    """A row while it is filled; it may grow beyond `length` and is cut afterwards."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.ids: list[int] = []
        self.weights: list[float] = []
        self.subjects: list[int] = []
        self.visible_until: list[int] = []

    def add(self, ids: Sequence[int], weight: float) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)
        self.subjects += [NO_SUBJECT] * len(ids)
        self.visible_until += [self.length] * len(ids)

    def add_sentence(self, sentence: Sentence, veiled: bool) -> None:
        start = len(self.ids)
        first, last = start + sentence.subject_start, start + sentence.subject_end
        self.add(sentence.ids[: -sentence.num_answer_tokens], OTHER_TOKEN_WEIGHT)
        self.add(sentence.ids[-sentence.num_answer_tokens :], 1.0)
        if sentence.subject == NO_SUBJECT:
            return
        self.subjects[last] = sentence.subject
        if veiled:
            self.visible_until[first:last] = [last] * (last - first)


def _fill(
    row: _Row, stream: Iterator[Sentence], stop_id: int, eos_id: int, rng: random.Random
) -> None:
    veiled = rng.random() < VEILED_SHARE
    if rng.random() < 0.5:
        row.add([eos_id], OTHER_TOKEN_WEIGHT)
    while len(row.ids) < row.length:
        row.add_sentence(next(stream), veiled)
        row.add([stop_id] if rng.random() < 0.8 else [stop_id, eos_id], OTHER_TOKEN_WEIGHT)


def _endless(sentences: Sequence[Sentence], rng: random.Random) -> Iterator[Sentence]:
    while True:
        yield from rng.sample(sentences, len(sentences))
