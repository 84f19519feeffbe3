"""Fine-tuning and UltraEdit written plainly: whole passes, one prompt at a time, weights' grads.

Methods: Zhu et al., "Modifying Memories in Transformer Models" (arXiv 2012.00363); the fine-tuning
baselines of Meng et al. (arXiv 2202.05262); Gu et al., "UltraEdit" (arXiv 2505.14679).

Legend: d hidden size, f input size of the down-projection.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from tests.oracles.memit import Edit, _logits, hooked, rewrite_rows


def edit_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edit: Edit,
    contexts: Sequence[str],
    *,
    last_prompt_token: bool,
) -> Tensor:
    """Mean over contexts and target tokens of the negative log-likelihood, with its graph."""
    losses = []
    for row in rewrite_rows(tokenizer, contexts, *edit):
        count = row.num_target
        prompt, target = row.ids[:-count], row.ids[-count:]
        if last_prompt_token:
            predicted = _logits(model, prompt)[-1].log_softmax(-1)
            tokens = [-predicted[token] for token in target]
        else:
            predicted = _logits(model, row.ids).log_softmax(-1)
            tokens = [-predicted[len(prompt) + i - 1, token] for i, token in enumerate(target)]
        losses.append(torch.stack(tokens).mean())
    return torch.stack(losses).mean()


@contextmanager
def trainable(downs: Sequence[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Let some down-projections' weights have gradients for a while."""
    weights: list[nn.Parameter] = [down.weight for down in downs]  # type: ignore[misc]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def oriented(down: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or its gradient, as (d, f)."""
    return weight.T if isinstance(down, Conv1D) else weight


def gradients(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    downs: Sequence[nn.Module],
    edits: Sequence[Edit],
    contexts: Sequence[str],
    *,
    last_prompt_token: bool,
) -> tuple[list[float], list[Tensor]]:
    """Every edit's loss, and the sum of their gradients in each weight, (d, f)."""
    losses = []
    with trainable(downs) as weights, torch.enable_grad():
        for edit in edits:
            given = (model, tokenizer, edit, contexts)
            loss = edit_loss(*given, last_prompt_token=last_prompt_token)
            loss.backward()
            losses.append(float(loss.detach()))
        found = [
            oriented(down, weight.grad).clone()
            for down, weight in zip(downs, weights, strict=True)
            if weight.grad is not None
        ]
    return losses, found


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    downs: Sequence[nn.Module],
    edits: Sequence[Edit],
    *,
    last_prompt_token: bool,
    norm_constraint: float | None,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    stop_loss: float,
) -> list[Tensor]:
    """What becomes of each weight, (d, f) changes; the model is left as it was."""
    with trainable(downs) as weights, torch.enable_grad():
        first = [weight.detach().clone() for weight in weights]
        optimiser = torch.optim.Adam(weights, lr=learning_rate, weight_decay=weight_decay)
        for _ in range(epochs):
            total = 0.0
            for start in range(0, len(edits), batch_size):
                batch = edits[start : start + batch_size]
                optimiser.zero_grad()
                losses = [
                    edit_loss(model, tokenizer, e, ["{}"], last_prompt_token=last_prompt_token)
                    for e in batch
                ]
                loss = torch.stack(losses).mean()
                total += float(loss.detach()) * len(batch)
                if float(loss.detach()) < stop_loss:
                    continue
                loss.backward()
                optimiser.step()
                if norm_constraint is not None:
                    for weight, at in zip(weights, first, strict=True):
                        weight.data.clamp_(at - norm_constraint, at + norm_constraint)
            if total / len(edits) < stop_loss:
                break
        changes = [
            oriented(down, weight.detach() - at).clone()
            for down, weight, at in zip(downs, weights, first, strict=True)
        ]
        for weight, at in zip(weights, first, strict=True):
            weight.data.copy_(at)
    return changes


class UltraEdit:
    """UltraEdit over rounds: all rows that were ever seen are kept, and moments taken of them.

    With `correction` 1 a round's rows vary within it by its unbiased variance times their number,
    as in the published code, and not by the sum of squares.
    """

    def __init__(self, learning_rate: float, correction: int = 0) -> None:
        self.learning_rate, self.correction = learning_rate, correction
        self.seen: list[Tensor] = []

    def updates(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        downs: Sequence[nn.Module],
        edits: Sequence[Edit],
    ) -> list[Tensor]:
        """A round's update of each weight, (d, f)."""
        keys: list[list[Tensor]] = [[] for _ in downs]
        slopes: list[list[Tensor]] = [[] for _ in downs]
        for edit in edits:
            (row,) = rewrite_rows(tokenizer, ["{}"], *edit)
            places = range(len(row.ids) - row.num_target - 1, len(row.ids) - 1)
            for number, (inputs, slope) in enumerate(
                _inputs_and_slopes(model, tokenizer, downs, edit)
            ):
                keys[number] += [inputs[place] for place in places]
                slopes[number] += [slope[place] for place in places]
        rows = [
            torch.stack([torch.cat([k, g]) for k, g in zip(ks, gs, strict=True)])
            for ks, gs in zip(keys, slopes, strict=True)
        ]
        self.seen.append(torch.cat(rows))
        everything = torch.cat(self.seen)
        mean = everything.mean(0)
        squares = [
            len(of_round) * (of_round.var(0, correction=self.correction)
                             + (of_round.mean(0) - mean) ** 2)
            for of_round in self.seen
        ]  # fmt: skip
        # As in the published code, a float32 epsilon keeps small deviations apart from none.
        deviation = (torch.stack(squares).sum(0) / len(everything)).sqrt()
        epsilon = torch.finfo(torch.float32).eps
        found = []
        for of_layer, raw in zip(rows, keys, strict=True):
            normal = torch.where(deviation > 0, (of_layer - mean) / (deviation + epsilon), 0.0)
            size = len(raw[0])
            key, slope = normal[:, :size], normal[:, size:]
            values = -self.learning_rate * (key**2).sum(1)[:, None] * slope
            stacked = torch.stack(raw)
            gram = stacked.T @ stacked + torch.eye(size).to(stacked)
            found.append((torch.linalg.inv(gram) @ stacked.T @ values).T)
        return found


def _inputs_and_slopes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    downs: Sequence[nn.Module],
    edit: Edit,
) -> list[tuple[Tensor, Tensor]]:
    """For each down-projection its inputs (T, f) and the loss' gradient in its outputs (T, d)."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        inputs.append(given[0].detach())
        outputs.append(output)

    handles = [down.register_forward_hook(keep) for down in downs]
    with trainable(downs), torch.enable_grad(), hooked(handles[0]), hooked(handles[-1]):
        edit_loss(model, tokenizer, edit, ["{}"], last_prompt_token=False).backward()
    for handle in handles:
        handle.remove()
    found = []
    for given, output in zip(inputs, outputs, strict=True):
        assert output.grad is not None
        width, length = given.shape[-1], output.shape[-1]
        found.append((given.reshape(-1, width), output.grad.reshape(-1, length)))
    return found
