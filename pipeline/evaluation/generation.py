"""Greedy continuations of prompts, without the answer in the input."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pipeline.errors import InputError
from pipeline.evaluation.packing import length_batches
from pipeline.evaluation.texts import matches
from pipeline.models.editable import EditableModel
from pipeline.models.routing import RoutedLogits
from pipeline.prompts import pad_token_id, token_ids

__all__ = ["generate", "matches"]


def generate(
    model: EditableModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_tokens: int,
    setting: str = "generate_tokens",
) -> list[str]:
    """Continue prompts with the most likely token each time; the new text only.

    A continuation ends before an end-of-text token or after `max_new_tokens`; an encoder-decoder
    model's is its answer. What the model's own generation settings say of sampling, beams and
    penalties does not count. Each distinct prompt is continued once.

    Args:
        batch_tokens: tokens of a batch at most, padding and the tokens to come counted; a longer
            prompt is a batch of its own.
        setting: the one of `evaluation` that `max_new_tokens` is, for messages.

    Raises:
        InputError: a prompt has no token, or the model has no positions for it and
            `max_new_tokens` more.
    """
    texts = list(dict.fromkeys(prompts))
    if not texts:
        return []
    rows = token_ids(tokenizer, texts)
    _check_fit(model.max_positions, texts, rows, max_new_tokens, setting)
    ends = _end_token_ids(model.model, tokenizer)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad_token_id(tokenizer),
        decoder_start_token_id=model.answers.start,
    )
    continued: dict[str, str] = {}
    with _generation_config(model.model, config), torch.inference_mode():
        for batch in length_batches([len(row) + max_new_tokens for row in rows], batch_tokens):
            some = [texts[i] for i in batch]
            new = _continue(model, some, [rows[i] for i in batch], pad_token_id(tokenizer))
            cut = [_until(ids, ends) for ids in new]
            decoded = tokenizer.batch_decode(cut, skip_special_tokens=True)
            continued.update(zip(some, decoded, strict=True))
    return [continued[prompt] for prompt in prompts]


def _continue(
    model: EditableModel, texts: Sequence[str], rows: Sequence[Sequence[int]], pad_id: int
) -> list[list[int]]:
    """New ids of each row: left padding, so that all rows grow at the same end.

    An encoder-decoder model's rows begin with the decoder's start token.
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows])
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device, options = model.input_device, model.new_cache()
    begun = 1 if model.answers.is_apart else width
    if model.router is not None:
        share = RoutedLogits(model.router.routes(texts), rows, begun)
        options["logits_processor"] = LogitsProcessorList([share])
    whole = model.model.generate(
        input_ids=ids.to(device), attention_mask=real.to(device), **options
    )
    return whole[:, begun:].tolist()


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Cut before the first end token: what follows is padding, which may be a token with a text."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-text ids: those of the model's generation settings (several in chat models) and the
    tokenizer's.
    """
    assert model.generation_config is not None
    found = model.generation_config.eos_token_id
    ends = list(found) if isinstance(found, list | tuple) else [found]
    return sorted({int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None})


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Put other generation settings in the place of the model's.

    Settings given to `generate` are filled up with the model's own, penalties among them.
    """
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _check_fit(
    limit: int | None,
    texts: Sequence[str],
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    setting: str,
) -> None:
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise InputError(f"generation prompt {text!r} has no token")
        if limit is not None and len(row) + max_new_tokens > limit:
            raise InputError(
                f"generation prompt {text[:60]!r} has {len(row)} tokens; with "
                f"evaluation.{setting} {max_new_tokens} that is more than the model's "
                f"{limit} positions; shorten the prompt or generate fewer tokens"
            )
