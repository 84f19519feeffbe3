"""MEMIT written plainly: the slow reference that the pipeline is compared with.

Method: Meng et al., "Mass-Editing Memory in a Transformer" (ICLR 2023), with the settings and the
order of operations of the code published with it. One edit, one prompt, one whole forward pass at
a time: no padding, no batching, no cache, no attention mask. Any floating dtype; updates are solved
in float64.

Legend: d hidden size, f input size of the down-projection, n edits, T tokens of a row.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D


class Edit(NamedTuple):
    """One fact to write; `prompt` has a `{}` where the subject goes."""

    prompt: str
    subject: str
    target_new: str


class Row(NamedTuple):
    """One prompt as the model sees it, and the token whose hidden state is edited."""

    ids: list[int]
    lookup: int
    num_target: int


class Value(NamedTuple):
    """How the search for one value went; the losses are those of the last forward pass."""

    initial_norm: float
    delta_norm: float
    steps: int
    loss: float
    nll: float
    kl: float
    target_probability: float
    losses: list[float]


def find_lookup(
    tokenizer: PreTrainedTokenizerBase, text: str, subject_start_char: int, subject_end_char: int
) -> int:
    """Index of the last token whose characters meet the subject's characters."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    meeting = [
        index
        for index, (start, end) in enumerate(offsets)
        if start < end and start < subject_end_char and end > subject_start_char
    ]
    if not meeting:
        raise ValueError(f"no token of {text!r} meets the subject")
    return meeting[-1]


def _prompt_row(tokenizer: PreTrainedTokenizerBase, context: str, prompt: str, subject: str) -> Row:
    """The context with the prompt with the subject in it; each `{}` is replaced literally."""
    before, after = context.split("{}", 1)
    left, right = prompt.split("{}", 1)
    text = before + left + subject + right + after
    start = len(before) + len(left)
    lookup = find_lookup(tokenizer, text, start, start + len(subject))
    return Row(list(tokenizer(text)["input_ids"]), lookup, 0)


def rewrite_rows(
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    prompt: str,
    subject: str,
    target_new: str,
) -> list[Row]:
    """One row a context: the ids of the filled prompt followed by the ids of the target."""
    target = target_new if target_new.startswith(" ") else " " + target_new
    target_ids = list(tokenizer(target, add_special_tokens=False)["input_ids"])
    rows = [_prompt_row(tokenizer, context, prompt, subject) for context in contexts]
    return [Row(row.ids + target_ids, row.lookup, len(target_ids)) for row in rows]


def kl_row(tokenizer: PreTrainedTokenizerBase, subject: str) -> Row:
    """The row at whose lookup position the next-token distribution is to stay as it was."""
    return _prompt_row(tokenizer, "{}", "{} is a", subject)


@contextmanager
def hooked(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Logits (T, vocabulary) of one sequence, from the whole model."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A block's hidden states; some blocks return them as the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def block_output(model: PreTrainedModel, block: nn.Module, row: Row) -> Tensor:
    """Output (d,) of a block at the row's lookup position."""
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _m, _i, output: seen.append(_hidden(output)))
    with hooked(handle):
        _logits(model, row.ids)
    return seen[0][0, row.lookup].clone()


@torch.no_grad()
def module_input(model: PreTrainedModel, module: nn.Module, ids: list[int]) -> Tensor:
    """Inputs (T, f) of a module for one sequence."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with hooked(handle):
        _logits(model, ids)
    return seen[0].reshape(len(ids), -1).clone()


def adder(lookup: int, delta: Tensor) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """A forward hook that adds delta to a block's output at one position."""

    def hook(
        _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        hidden = _hidden(output).clone()
        hidden[0, lookup] = hidden[0, lookup] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


def _log_probs(model: PreTrainedModel, block: nn.Module, row: Row, delta: Tensor) -> Tensor:
    """Log-probabilities (T, vocabulary) with delta added to the block's output at the lookup."""
    with hooked(block.register_forward_hook(adder(row.lookup, delta))):
        return torch.log_softmax(_logits(model, row.ids), dim=-1)


def _row_nll(log_probs: Tensor, row: Row) -> Tensor:
    """Mean negative log-likelihood of a row's target tokens, each predicted one place before."""
    first = len(row.ids) - row.num_target
    picked = [log_probs[place - 1, row.ids[place]] for place in range(first, len(row.ids))]
    return -torch.stack(picked).mean()


def compute_value(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[nn.Module],
    layer: int,
    request: Edit,
    contexts: Sequence[str],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    kl_weight: float,
    clamp_norm: float,
    stop_loss: float,
) -> tuple[Tensor, Value]:
    """The value z (d,), in the model's dtype, that makes the block's output state the new fact.

    z = h0 + delta, where delta minimises NLL + kl_weight * KL(p_delta || p_0) +
    weight_decay * ||delta|| / ||h0||^2 under ||delta|| <= clamp_norm * ||h0||, by `steps` forward
    passes and at most `steps - 1` Adam updates. h0 is the clean output at row 0's lookup position.
    """
    model.requires_grad_(False)
    block = blocks[layer]
    rows = rewrite_rows(tokenizer, contexts, *request)
    kl_prompt = kl_row(tokenizer, request.subject)
    h0 = block_output(model, block, rows[0])
    h0_norm = h0.norm()
    delta = torch.zeros_like(h0, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=learning_rate)
    with torch.no_grad():
        clean = _log_probs(model, block, kl_prompt, delta)[kl_prompt.lookup]

    losses: list[float] = []
    for step in range(steps):
        row_nlls = [_row_nll(_log_probs(model, block, row, delta), row) for row in rows]
        nll = torch.stack(row_nlls).mean()
        edited = _log_probs(model, block, kl_prompt, delta)[kl_prompt.lookup]
        kl = (edited.exp() * (edited - clean)).sum()
        loss = nll + kl_weight * kl + weight_decay * delta.norm() / h0_norm**2
        losses.append(loss.item())
        if loss.item() < stop_loss or step == steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            limit = clamp_norm * h0_norm
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())

    delta = delta.detach()
    info = Value(
        initial_norm=h0_norm.item(),
        delta_norm=delta.norm().item(),
        steps=len(losses),
        loss=losses[-1],
        nll=nll.item(),
        kl=kl.item(),
        target_probability=torch.exp(-torch.stack(row_nlls)).mean().item(),
        losses=losses,
    )
    return h0 + delta, info


def compute_key(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    down_projection: nn.Module,
    request: Edit,
    contexts: Sequence[str],
    *,
    in_groups: bool = True,
) -> Tensor:
    """The key (f,): half the bare prompt's, half the mean over the other contexts; or ROME's.

    With the bare context alone, that one's; `in_groups=False` is the mean over all contexts. A key
    is the input of the down-projection at the subject's last token.
    """
    if contexts[0] != "{}":
        raise ValueError(f"the first context must be the bare '{{}}', not {contexts[0]!r}")
    keys = []
    for context in contexts:
        row = _prompt_row(tokenizer, context, request.prompt, request.subject)
        keys.append(module_input(model, down_projection, row.ids)[row.lookup])
    if len(keys) == 1:
        return keys[0]
    if not in_groups:
        return torch.stack(keys).mean(dim=0)
    return (keys[0] + torch.stack(keys[1:]).mean(dim=0)) / 2


def compute_covariance(
    model: PreTrainedModel,
    down_projections: Sequence[nn.Module],
    token_id_lists: Sequence[list[int]],
) -> dict[int, Tensor]:
    """Per layer the uncentred second moment (f, f), float64: the mean of k k^T over all tokens."""
    covariances = {}
    for layer, module in enumerate(down_projections):
        keys = [key for ids in token_id_lists for key in module_input(model, module, ids).double()]
        total = torch.zeros(len(keys[0]), len(keys[0]), dtype=torch.float64)
        for key in keys:
            total += torch.outer(key, key)
        covariances[layer] = total / len(keys)
    return covariances


def solve_update(
    keys_fn: Tensor, residuals_dn: Tensor, covariance_ff: Tensor, covariance_weight: float
) -> Tensor:
    """The update (d, f) that minimises ||D K - R||_F^2 + covariance_weight * tr(D C D^T)."""
    gram_ff = covariance_weight * covariance_ff + keys_fn @ keys_fn.T
    return residuals_dn @ torch.linalg.solve(gram_ff, keys_fn).T


def _edit_weight(module: nn.Module, update_df: Tensor) -> None:
    """Add an update (d, f) to a module's weight; Conv1D keeps its weight as (f, d)."""
    stored = update_df.T if isinstance(module, Conv1D) else update_df
    weight = module.get_parameter("weight")
    weight.data += stored.to(weight)


def update_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[nn.Module],
    down_projections: Sequence[nn.Module],
    layers: Sequence[int],
    requests: Sequence[Edit],
    contexts: Sequence[str],
    covariances: dict[int, Tensor],
    covariance_weight: float,
    values: Sequence[Tensor],
    solve: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None,
) -> dict[int, Tensor]:
    """Per layer the update (d, f), float64, that brings the last layer's outputs to the values.

    Another method's `solve` takes the layer, keys (f, n), residuals (d, n) and covariance (f, f).

    Layers are edited in ascending order on a copy of the model; keys and what is missing of the
    values are measured again before each, and each takes its equal share of what is missing.
    """
    names = {module: name for name, module in model.named_modules()}
    edited = copy.deepcopy(model)
    ordered = sorted(layers)
    last_block = edited.get_submodule(names[blocks[ordered[-1]]])
    bare = [_prompt_row(tokenizer, contexts[0], edit.prompt, edit.subject) for edit in requests]
    updates = {}
    for index, layer in enumerate(ordered):
        module = edited.get_submodule(names[down_projections[layer]])
        keys = [compute_key(edited, tokenizer, module, edit, contexts) for edit in requests]
        outputs = [block_output(edited, last_block, row) for row in bare]
        missing = [
            value.double() - output.double() for value, output in zip(values, outputs, strict=True)
        ]
        keys_fn = torch.stack(keys, dim=1).double()
        residuals_dn = torch.stack(missing, dim=1) / (len(ordered) - index)
        covariance_ff = covariances[layer].double()
        if solve is None:
            update = solve_update(keys_fn, residuals_dn, covariance_ff, covariance_weight)
        else:
            update = solve(layer, keys_fn, residuals_dn, covariance_ff)
        updates[layer] = update
        _edit_weight(module, updates[layer])
    return updates


def apply_memit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Sequence[nn.Module],
    down_projections: Sequence[nn.Module],
    layers: Sequence[int],
    requests: Sequence[Edit],
    contexts: Sequence[str],
    covariances: dict[int, Tensor],
    covariance_weight: float,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    kl_weight: float,
    clamp_norm: float,
    stop_loss: float,
) -> dict[int, Tensor]:
    """The whole of MEMIT: values at the last layer, then the updates (d, f) of all layers.

    The model passed in keeps its weights.
    """
    values = [
        compute_value(
            model,
            tokenizer,
            blocks,
            max(layers),
            edit,
            contexts,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            kl_weight=kl_weight,
            clamp_norm=clamp_norm,
            stop_loss=stop_loss,
        )[0]
        for edit in requests
    ]
    return update_weights(
        model,
        tokenizer,
        blocks,
        down_projections,
        layers,
        requests,
        contexts,
        covariances,
        covariance_weight,
        values,
    )
