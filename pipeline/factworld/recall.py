"""Measure how many facts the model recalls, and how many questions about them it answers."""

from collections.abc import Sequence

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.factworld.questions import Statement
from pipeline.factworld.world import Fact, World

BATCH_SIZE = 256


def recall(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    held_out: bool,
    facts: Sequence[Fact] | None = None,
    max_phrasings: int | None = None,
) -> float:
    """Return the share of prompts whose object is the model's greedy continuation, token by token.

    All facts (or the given ones) in their seen phrasings, or in their held-out ones; of each
    fact all of these, or the first `max_phrasings`.
    """
    rows = [
        (prompt, f" {fact.object}")
        for fact in (world.facts if facts is None else facts)
        for prompt in world.prompts(fact, held_out=held_out)[:max_phrasings]
    ]
    return _share_exact(model, tokenizer, rows)


def answered(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, statements: Sequence[Statement]
) -> float:
    """Return the share of statements whose prompt the model ends as they do, token by token.

    Raises:
        ValueError: there are no statements.
    """
    if not statements:
        raise ValueError("there are no statements to end")
    rows = [(statement.prompt, f" {statement.answer}") for statement in statements]
    return _share_exact(model, tokenizer, rows)


def _share_exact(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]]
) -> float:
    prompts = tokenizer([prompt for prompt, _ in rows])["input_ids"]
    targets = tokenizer([target for _, target in rows])["input_ids"]
    pairs = sorted(zip(prompts, targets, strict=True), key=lambda p: len(p[0]) + len(p[1]))
    hits = sum(
        _num_exact(model, pairs[i : i + BATCH_SIZE], tokenizer.pad_token_id)
        for i in range(0, len(pairs), BATCH_SIZE)
    )
    return hits / len(pairs)


@torch.no_grad()
def _num_exact(
    model: GPT2LMHeadModel, pairs: Sequence[tuple[list[int], list[int]]], pad_id: int
) -> int:
    width = max(len(prompt) + len(target) for prompt, target in pairs)
    ids = torch.full((len(pairs), width), pad_id)
    is_target = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, target) in enumerate(pairs):
        end = len(prompt) + len(target)
        ids[row, :end] = torch.tensor(prompt + target)
        is_target[row, len(prompt) : end] = True
    # Padding is on the right, where a causal model cannot see it.
    predicted = model(input_ids=ids).logits[:, :-1].argmax(-1)
    right = (predicted == ids[:, 1:]) | ~is_target[:, 1:]
    return int(right.all(dim=1).sum())
