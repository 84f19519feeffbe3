"""Scoring written plainly: one prompt and one answer at a time, through the whole model.

No padding, no batching, no mask, no shared computation. Any floating dtype.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Judged(NamedTuple):
    """What the model says to one answer behind one prompt."""

    nll: float  # mean over the answer's tokens, in nats
    exact: bool  # every token of the answer is the argmax


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> Judged:
    prompt_ids = tokenizer(prompt)["input_ids"]
    spaced = answer if answer.startswith(" ") else " " + answer
    answer_ids = tokenizer(spaced, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        output = model(input_ids=torch.tensor([prompt_ids + answer_ids[:-1]]))
    logits = output.logits[0]
    if logits.dtype != torch.float64:
        logits = logits.float()
    total = 0.0
    exact = True
    for offset, token in enumerate(answer_ids):
        predicting = logits[len(prompt_ids) + offset - 1]
        total -= float(torch.log_softmax(predicting, dim=-1)[token])
        exact = exact and int(predicting.argmax()) == token
    return Judged(total / len(answer_ids), exact)
