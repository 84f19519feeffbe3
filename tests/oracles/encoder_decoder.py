"""An encoder-decoder model asked plainly: transformers' own loss, one prompt and answer at a time.

No padding, no packing, no mask, nothing computed once. Any floating dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Adam
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.oracles.gradients import trainable
from tests.oracles.memit import Edit
from tests.oracles.scoring import Judged


def loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> Tensor:
    """Mean negative log-likelihood of the answer's tokens, its end among them, with its graph."""
    asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
    labels = tokenizer(answer, return_tensors="pt")["input_ids"]
    found: Tensor = model(input_ids=asked, labels=labels).loss
    return found


def judge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str
) -> Judged:
    """What the model says to one answer."""
    asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
    labels = tokenizer(answer, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(input_ids=asked, labels=labels)
    return Judged(float(output.loss), bool((output.logits[0].argmax(-1) == labels[0]).all()))


def edit_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    contexts: Sequence[str],
    *,
    at_start: bool = False,
) -> Tensor:
    """Mean over contexts of an edit's loss; `at_start` predicts all tokens at the start token."""
    text = edit.prompt.replace("{}", edit.subject, 1)
    losses = []
    for context in contexts:
        prompt = context.replace("{}", text, 1)
        if not at_start:
            losses.append(loss(model, tokenizer, prompt, edit.target_new))
            continue
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        labels = tokenizer(edit.target_new)["input_ids"]
        start = torch.tensor([[model.config.decoder_start_token_id]])
        predicted = model(input_ids=asked, decoder_input_ids=start).logits[0, 0].log_softmax(-1)
        losses.append(-predicted[labels].mean())
    return torch.stack(losses).mean()


def gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    downs: Sequence[torch.nn.Module],
    edits: Sequence[Edit],
    contexts: Sequence[str],
    *,
    at_start: bool = False,
) -> tuple[list[float], list[Tensor]]:
    """Every edit's loss, and the sum of their gradients in each weight, (d, f)."""
    with trainable(downs) as weights, torch.enable_grad():
        losses = [edit_loss(model, tokenizer, e, contexts, at_start=at_start) for e in edits]
        found = torch.autograd.grad(torch.stack(losses).sum(), weights)
    return [float(one.detach()) for one in losses], list(found)


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    downs: Sequence[torch.nn.Module],
    edits: Sequence[Edit],
    *,
    epochs: int,
    learning_rate: float,
) -> list[Tensor]:
    """Adam on the mean loss of all edits; what becomes of each weight; the model is left alone."""
    with trainable(downs) as weights, torch.enable_grad():
        first = [weight.detach().clone() for weight in weights]
        optimiser = Adam(weights, lr=learning_rate)
        for _ in range(epochs):
            optimiser.zero_grad()
            losses = [edit_loss(model, tokenizer, edit, ["{}"]) for edit in edits]
            torch.stack(losses).mean().backward()
            optimiser.step()
        changes = [w.detach() - at for w, at in zip(weights, first, strict=True)]
        for weight, at in zip(weights, first, strict=True):
            weight.data.copy_(at)
    return changes


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new: int
) -> str:
    """The likeliest token each time, by whole passes and without a cache."""
    asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = [model.config.decoder_start_token_id]
    with torch.no_grad():
        while len(ids) <= new:
            logits = model(input_ids=asked, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            token = int(logits.argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids[1:], skip_special_tokens=True)  # type: ignore[no-any-return]
