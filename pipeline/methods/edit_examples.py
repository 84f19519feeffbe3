"""What editors are trained on: an edit, another way to ask for it, and something to leave alone."""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pipeline.editing.locality import KeptRow
from pipeline.editing.targets import target_row
from pipeline.errors import InputError
from pipeline.models.answers import CONTINUED, AnswerForm
from pipeline.prompts import EditPrompts, Row, encode_targets, split_text, token_ids
from pipeline.requests import EditRequest

Left = tuple[str, str | None]
"""A prompt with its answer, or a text without one."""


@dataclass(frozen=True)
class EditExample:
    """An edit to train on.

    Attributes:
        edit: it.
        asked: a prompt that the edited model is asked by; the answer is the edit's.
        left: what is to stay as it is.
    """

    edit: EditRequest
    asked: str
    left: Left


def draw_examples(
    requests: Sequence[EditRequest],
    others: Sequence[EditRequest],
    texts: Sequence[str],
    generator: random.Random,
    *,
    own_prompt_share: float,
) -> list[EditExample]:
    """Make an example of each request.

    It is asked by one of its paraphrases, or as it is where it has none, and in `own_prompt_share`
    of all cases. What is left alone is one of `texts`, where there are some; else one of its
    locality questions or neighbours, or of another request's where it has none.

    Raises:
        InputError: there is nothing to leave alone.
    """
    return [
        EditExample(
            request,
            _asked(request, generator, own_prompt_share),
            (generator.choice(texts), None) if texts else _left(request, others, generator),
        )
        for request in requests
    ]


def _asked(request: EditRequest, generator: random.Random, own_prompt_share: float) -> str:
    if own_prompt_share and generator.random() < own_prompt_share:
        return request.text
    return generator.choice(request.paraphrase_prompts or (request.text,))


def _left(request: EditRequest, others: Sequence[EditRequest], generator: random.Random) -> Left:
    if own := _questions(request):
        return generator.choice(own)
    start = generator.randrange(len(others))
    for place in range(len(others)):
        if found := _questions(others[(start + place) % len(others)]):
            return generator.choice(found)
    raise InputError(
        "train.corpus: no request has a locality question or a neighbour, so that there is nothing"
        " to leave alone; give requests with some, or a train.corpus of texts"
    )


def _questions(request: EditRequest) -> list[Left]:
    near: list[Left] = [(prompt, request.target_true) for prompt in request.neighborhood_prompts]
    return near + [(probe.prompt, probe.target) for probe in request.locality]


class Targets:
    """The new answers that requests of a relation have, and with `old` the ones before the edit."""

    def __init__(self, requests: Sequence[EditRequest], *, old: bool) -> None:
        by_relation: defaultdict[str | None, dict[str, None]] = defaultdict(dict)
        for request in requests:
            targets = (request.target_new, request.target_true if old else None)
            for target in filter(None, targets):
                by_relation[request.relation_id][target] = None
        self._by_relation = {name: list(found) for name, found in by_relation.items()}

    def redirected(self, request: EditRequest, generator: random.Random) -> EditRequest:
        """The request with one of its relation that is not the answer before the edit."""
        found = self._by_relation.get(request.relation_id, [])
        others = [target for target in found if target != request.target_true]
        target = generator.choice(others or [request.target_new])
        return request.model_copy(update={"target_new": target})


def asked_rows(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EditExample],
    answers: AnswerForm = CONTINUED,
) -> list[EditPrompts]:
    """The prompts that edited models are asked by, with the edits' answers."""
    prompts = token_ids(tokenizer, [example.asked for example in examples])
    targets = encode_targets(tokenizer, [one.edit.target_new for one in examples], answers)
    found = []
    for example, ids, target in zip(examples, prompts, targets, strict=True):
        row, subject = Row(tuple(ids), len(ids) - 1), example.edit.subject
        found.append(EditPrompts((row,), target, row, subject, start=answers.start))
    return found


def kept_rows(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EditExample],
    answers: AnswerForm = CONTINUED,
    *,
    max_tokens: int,
    answers_only: bool,
) -> list[KeptRow]:
    """What is to be left alone, as rows.

    Args:
        tokenizer: the model's.
        examples: whose.
        answers: the model's form of answers.
        max_tokens: a text is cut to.
        answers_only: where there is an answer, only the tokens that predict it count; else all do.
    """
    prompts = token_ids(tokenizer, [example.left[0] for example in examples])
    found = []
    for example, ids in zip(examples, prompts, strict=True):
        if example.left[1] is None:
            text, source = split_text(ids[:max_tokens], answers)
            found.append(KeptRow(text, tuple(range(len(text))), source))
            continue
        (answer,) = encode_targets(tokenizer, [example.left[1]], answers)
        row = target_row(0, tuple(ids), answer, 1.0, answers.start)
        first = row.places[0] if answers_only else 0
        found.append(KeptRow(row.ids, tuple(range(first, len(row.ids))), row.source))
    return found
