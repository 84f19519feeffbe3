"""Context templates, tokenisation, and the subject's last token."""

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.errors import InputError
from pipeline.models.answers import CONTINUED, AnswerForm
from pipeline.models.editable import EditableModel

if TYPE_CHECKING:
    # The editing core runs where torch and transformers are all there is (benchmarks/gpu.py).
    from pipeline.requests import EditRequest

CONTEXT_SEEDS = ("The", "Therefore", "Because", "I", "You")
CONTEXT_TOKENS = 10
KL_TEMPLATE = "{} is a"
_TEXTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Row:
    """One prompt as token ids, and the index of the subject's last token (the lookup token)."""

    ids: tuple[int, ...]
    lookup: int


@dataclass(frozen=True)
class EditPrompts:
    """What the editing core needs to know of one request.

    Attributes:
        rewrites: the prompt behind each context template, in the templates' order; no target.
        target: token ids of the new object.
        essence: "{subject} is a", the row at which the KL term is read.
        subject: the entity that the request is about.
        relation: what edits that may begin a search from each other's outcome have in common.
        start: the token that an encoder-decoder model's decoder begins the target with, whose
            encoder reads the prompts; None where the target follows the prompt's own tokens.
    """

    rewrites: tuple[Row, ...]
    target: tuple[int, ...]
    essence: Row
    subject: str
    relation: str | None = None
    start: int | None = None

    @property
    def sources(self) -> list[int]:
        """Tokens that an encoder reads of every prompt."""
        return [0 if self.start is None else len(row.ids) for row in self.rewrites]

    @property
    def stems(self) -> list[int]:
        """Tokens before the target in every row that predicts it."""
        return [len(row.ids) if self.start is None else 1 for row in self.rewrites]


@dataclass(frozen=True)
class FactPrompts:
    """What is asked about a fact whose neurons are looked for.

    Attributes:
        prompts: token ids of every prompt that the answer follows; the bare one first.
        old: token ids of the answer that the model gives; None leaves it to the model.
        new: those of the answer that it shall give.
    """

    prompts: tuple[tuple[int, ...], ...]
    old: tuple[int, ...] | None
    new: tuple[int, ...]


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Keep Python's garbage collector still for a while.

    Of a hundred thousand small tuples none is in a cycle; walking through all of them again and
    again takes longer than making them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collector_at_rest()
def tokenize_edits(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence["EditRequest"],
    contexts: Sequence[str],
    answers: AnswerForm = CONTINUED,
) -> list[EditPrompts]:
    """Tokenise requests behind every context template, all in one batch.

    The target's ids follow the prompt's ids; the text is never decoded and segmented again.

    Args:
        tokenizer: the model's.
        requests: what to edit.
        contexts: templates with one {} each.
        answers: the model's form of answers (`EditableModel.answers`).

    Raises:
        InputError: a subject or a target has no token of its own in this tokenizer.
    """
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    for request in requests:
        for context in contexts:
            _append_filled(texts, spans, context, request.text, request.subject_span)
        _append_filled(texts, spans, KL_TEMPLATE, request.subject, (0, len(request.subject)))
    if not texts:
        return []
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False)
    # One text's offsets at a time: those of all at once are millions of Python objects.
    rows = [
        Row(tuple(ids), lookup_token(encoding.offsets, span, text))
        for ids, encoding, span, text in zip(
            encoded["input_ids"], encoded.encodings, spans, texts, strict=True
        )
    ]
    targets = encode_targets(tokenizer, [request.target_new for request in requests], answers)
    width = len(contexts) + 1
    return [
        EditPrompts(
            tuple(rows[i * width : i * width + len(contexts)]),
            target,
            rows[i * width + len(contexts)],
            requests[i].subject,
            requests[i].relation_id,
            answers.start,
        )
        for i, target in enumerate(targets)
    ]


def tokenize_fact_prompts(
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence["EditRequest"],
    contexts: Sequence[str],
    *,
    paraphrases: bool,
    with_old: bool,
) -> list[FactPrompts]:
    """Tokenise what is asked about each request's fact.

    Args:
        paraphrases: ask `paraphrase_prompts` beside the prompt behind every context.
        with_old: take `target_true`, which every request has, for the answer given.

    Raises:
        InputError: a subject or a target has no token of its own in this tokenizer.
    """
    edits = tokenize_edits(tokenizer, requests, contexts)
    asked = [request.paraphrase_prompts if paraphrases else () for request in requests]
    other = iter(token_ids(tokenizer, [text for texts in asked for text in texts]))
    old: Sequence[tuple[int, ...] | None] = [None] * len(edits)
    if with_old:
        old = encode_targets(tokenizer, [str(request.target_true) for request in requests])
    return [
        FactPrompts(
            (*(row.ids for row in edit.rewrites), *(tuple(next(other)) for _ in texts)),
            answer,
            edit.target,
        )
        for edit, texts, answer in zip(edits, asked, old, strict=True)
    ]


def token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of many texts; what a tokenizer makes besides would take half the time."""
    return list(iter_token_ids(tokenizer, texts, add_special_tokens=add_special_tokens))


def iter_token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, add_special_tokens: bool = True
) -> Iterator[list[int]]:
    """The same one text after another: of a million texts, some thousands are held at a time."""
    left = iter(texts)
    while some := list(islice(left, _TEXTS_AT_ONCE)):
        encoded = tokenizer(
            some,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        yield from encoded["input_ids"]


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, targets: Sequence[str], answers: AnswerForm = CONTINUED
) -> list[tuple[int, ...]]:
    """Encode objects as they continue a prompt: one leading space, no special tokens.

    Of an encoder-decoder model they are texts of their own, as it was trained: whatever the
    tokenizer puts around a text, and the end token at the end.
    """
    if answers.is_apart:
        return _encode_apart(tokenizer, targets, answers)
    spaced = [target if target.startswith(" ") else f" {target}" for target in targets]
    encoded = token_ids(tokenizer, spaced, add_special_tokens=False)
    _require_tokens(targets, encoded)
    return [tuple(ids) for ids in encoded]


def _encode_apart(
    tokenizer: PreTrainedTokenizerBase, targets: Sequence[str], answers: AnswerForm
) -> list[tuple[int, ...]]:
    texts = [target.strip() for target in targets]
    _require_tokens(targets, token_ids(tokenizer, texts, add_special_tokens=False))
    encoded = token_ids(tokenizer, texts)
    return [tuple(ids if ids[-1] == answers.end else [*ids, answers.end]) for ids in encoded]  # type: ignore[list-item]


def split_text(
    ids: Sequence[int], answers: AnswerForm
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """A running text as a model's row of tokens, and what an encoder reads of it.

    An encoder reads the first half, and the decoder goes on behind its start token, as the model
    does it where it learns from running text (prefix language models, arXiv 1910.10683, section
    3.2.1).

    Args:
        ids: the text's token ids, at least one.
        answers: the model's form of answers.
    """
    if answers.start is None or answers.end is None:
        return tuple(ids), None
    text = ids[:-1] if ids[-1] == answers.end else ids
    half = len(text) // 2
    return (answers.start, *text[half:]), (*text[:half], answers.end)


def _require_tokens(targets: Sequence[str], encoded: Sequence[Sequence[int]]) -> None:
    for target, ids in zip(targets, encoded, strict=True):
        if not ids:
            raise InputError(f"target {target!r} has no token in this model's tokenizer")


def lookup_token(offsets: Sequence[tuple[int, int]], span: tuple[int, int], text: str) -> int:
    """Index of the last token whose characters intersect the subject's characters.

    Raises:
        InputError: no token does.
    """
    start, end = span
    for index in range(len(offsets) - 1, -1, -1):
        token_start, token_end = offsets[index]
        if token_start < end and token_end > start and token_end > token_start:
            return index
    raise InputError(f"the subject {text[start:end]!r} has no token in {text!r}")


def generate_contexts(
    model: EditableModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[str, ...]:
    """Draw MEMIT's context templates from the model itself (arXiv 2210.07229, section 4.3).

    The bare `{}` first, then one continuation of each of five seed words, ten tokens with the
    word's own, sampled from the five most likely tokens. Braces are taken out of what the model
    says. The caller's random state is left as it was.
    """
    texts = []
    devices = [device for device in model.devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for word in CONTEXT_SEEDS:
            encoded = tokenizer(word, return_tensors="pt").to(model.input_device)
            ids = model.model.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                do_sample=True,
                top_k=5,
                max_length=CONTEXT_TOKENS,
                pad_token_id=pad_token_id(tokenizer),
            )
            texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    cleaned = (" ".join(text.replace("{", " ").replace("}", " ").split()) for text in texts)
    return ("{}", *(f"{text.rstrip('.')}. {{}}" for text in cleaned))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with; padding is masked everywhere, so any valid id does."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _append_filled(
    texts: list[str],
    spans: list[tuple[int, int]],
    template: str,
    text: str,
    span: tuple[int, int],
) -> None:
    shift = template.index("{}")
    texts.append(template[:shift] + text + template[shift + 2 :])
    spans.append((shift + span[0], shift + span[1]))
