"""SERAC written plainly: one text at a time, no padding, no cache, no batching.

It shares with the project the transformers models that it calls, and nothing else.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Stored(NamedTuple):
    prompt: str
    target: str


def spaced(answer: str) -> str:
    return answer if answer.startswith(" ") else " " + answer


def embedding(
    trunk: PreTrainedModel, head_weight: Tensor, last_block: torch.nn.Module, ids: list[int]
) -> Tensor:
    """Mean over tokens of what the trunk's last block puts out, through the linear head."""
    seen: list[Any] = []
    handle = last_block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        trunk(input_ids=torch.tensor([ids]))
    handle.remove()
    state = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return head_weight.double() @ state[0].double().mean(dim=0)


def edit_ids(tokenizer: Any, edit: Stored) -> list[int]:
    answer = tokenizer(spaced(edit.target), add_special_tokens=False)["input_ids"]
    return tokenizer(edit.prompt)["input_ids"] + answer


def scope(edit: Tensor, query: Tensor, scale: float) -> float:
    return math.exp(-scale * float(((edit - query) ** 2).sum()))


def counterfactual_row(tokenizer: Any, edit: Stored, query_ids: list[int]) -> list[int]:
    """Ids of "x_e y_e " and x; a begin token stands once, in front."""
    gap = tokenizer(" ", add_special_tokens=False)["input_ids"]
    begins = tokenizer.bos_token_id is not None and query_ids[0] == tokenizer.bos_token_id
    return edit_ids(tokenizer, edit) + gap + (query_ids[1:] if begins else query_ids)


def next_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].double()


def answer_probabilities(
    base: PreTrainedModel,
    h: PreTrainedModel,
    tokenizer: Any,
    query: str,
    answered: list[int],
    edit: Stored | None,
    share: float,
) -> Tensor:
    """Probabilities of the token behind a query and some answer tokens, (v,) float64."""
    ids = tokenizer(query)["input_ids"]
    first = next_logits(base, ids + answered).softmax(-1)
    if edit is None or share == 0:
        return first
    row = counterfactual_row(tokenizer, edit, ids)
    second = next_logits(h, row + answered).softmax(-1)
    return (1 - share) * first + share * second


def decoder_logits(model: PreTrainedModel, source: list[int], answered: list[int]) -> Tensor:
    """Of an encoder-decoder model, at every token that its decoder reads: (tokens, v)."""
    ids = torch.tensor([[model.config.decoder_start_token_id, *answered]])
    found: Tensor = model(input_ids=torch.tensor([source]), decoder_input_ids=ids).logits[0]
    return found.double()


def edit_texts(tokenizer: Any, edit: Stored) -> list[int]:
    """Ids of an edit for an encoder-decoder model: two texts, each with its end."""
    prompt, target = (tokenizer(text)["input_ids"] for text in edit)
    return [*prompt, *target]


@torch.no_grad()
def decoder_probabilities(
    base: PreTrainedModel,
    h: PreTrainedModel,
    tokenizer: Any,
    query: str,
    answered: list[int],
    edit: Stored,
    share: float,
) -> Tensor:
    """`answer_probabilities` of encoder-decoder models."""
    ids = tokenizer(query)["input_ids"]
    first = decoder_logits(base, ids, answered)[-1].softmax(-1)
    second = decoder_logits(h, [*edit_texts(tokenizer, edit), *ids], answered)[-1].softmax(-1)
    return (1 - share) * first + share * second


def balanced_loss(positive: list[float], negative: list[float]) -> float:
    """From similarities: mean -log s over positives, plus mean -log(1 - s) over negatives."""
    return sum(-math.log(s) for s in positive) / len(positive) + sum(
        -math.log(1 - s) for s in negative
    ) / len(negative)
