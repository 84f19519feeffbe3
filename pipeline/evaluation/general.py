"""What the rest of the model lost: held-out text, neutral prompts, and the edited weights.

nll: mean negative log-likelihood of a token of held-out text given those before it in its text, in
nats; a text's first token has none before it and is not asked for. perplexity is exp(nll).

token_accuracy: share of those tokens that are the model's argmax.

kl: mean over neutral prompts of KL(P || P') = sum_v P(v) (log P(v) - log P'(v)) in nats, where P is
the unedited model's distribution of the next token and P' the edited one's. The unedited model is
no second model: its states are computed with the pristine weights put back for a moment (only the
edited matrices differ), so P is exact, is not stored, and needs no earlier round.

same_argmax: share of those prompts after which both have the same most likely token.

Of a model with a router (`pipeline.models.routing`) the prompts are answered as it sends them, and
held-out texts are read by the edited model itself: they ask nothing.

weight_norm, update_norm: Frobenius norms of an edited weight, and of all that was added to it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.editing.batching import token_batches
from pipeline.editing.update import EditedWeights
from pipeline.evaluation.scoring import LOGIT_BYTES, project
from pipeline.models.editable import EditableModel
from pipeline.models.routing import Routes, mixed
from pipeline.prompts import token_ids

_OF_WEIGHTS = ("weight_norm", "update_norm")

Rows = list[list[int]]


@torch.inference_mode()
def measure(
    weights: EditedWeights,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    prompts: Sequence[str],
    *,
    text_tokens: int | None,
    batch_tokens: int,
    round: int,
) -> list[dict[str, Any]]:
    """Measure a model as it is now; rows of general/ that `combine` adds up.

    Args:
        weights: the model's edited weights, which can put the unedited ones back for a moment.
        texts: held-out texts.
        prompts: neutral prompts.
        text_tokens: cut texts and prompts to this many tokens; None, and at any rate the model's
            positions, cuts there.
        batch_tokens: tokens of a batch at most, padding counted.
        round: the round after which the model is measured, -1 for the unedited one.
    """
    model = weights.model
    asked = [text for text in prompts if tokenizer(text)["input_ids"]]
    found = [
        *_on_texts(model, _encode(model, tokenizer, texts, text_tokens), batch_tokens),
        *_on_prompts(weights, asked, _encode(model, tokenizer, asked, text_tokens), batch_tokens),
    ]
    rows = [_row(round, name, None, value, count) for name, value, count in found if count]
    for layer in weights.layers:
        size = model.oriented_weight(layer).numel()
        for name, norm in zip(_OF_WEIGHTS, weights.norms(layer), strict=True):
            rows.append(_row(round, name, layer, norm, size))
    return rows


def combine(tables: Sequence[pa.Table]) -> list[dict[str, Any]]:
    """Merge what workers measured on parts of the texts, in their order, and add the perplexity.

    Means are weighted by their counts; norms are those of the first table, since all workers hold
    the same weights.
    """
    rows = [row for table in tables for row in table.to_pylist()]
    norms = [row for row in tables[0].to_pylist() if row["layer"] is not None]
    merged = []
    for name in dict.fromkeys(row["measure"] for row in rows if row["layer"] is None):
        parts = [row for row in rows if row["measure"] == name]
        count = sum(part["count"] for part in parts)
        mean = math.fsum(part["value"] * part["count"] for part in parts) / count
        merged.append(_row(parts[0]["round"], name, None, mean, count))
        if name == "nll":
            merged.append(_row(parts[0]["round"], "perplexity", None, _exp(mean), count))
    return [*merged, *norms]


def summarise_general(table: pa.Table) -> list[dict[str, Any]]:
    """Reshape a GENERAL table for summary.json: one entry a round, in ascending order.

    Each holds `round` and every measure; norms are {layer, as text: value}. What is not finite,
    which JSON does not have, is None.
    """
    rounds: dict[int, dict[str, Any]] = {}
    for row in table.sort_by([("round", "ascending")]).to_pylist():
        entry = rounds.setdefault(row["round"], {"round": row["round"]})
        value = row["value"] if math.isfinite(row["value"]) else None
        if row["layer"] is None:
            entry[row["measure"]] = value
        else:
            entry.setdefault(row["measure"], {})[str(row["layer"])] = value
    return list(rounds.values())


def neutral_prompt(text: str) -> str:
    """The first half of a text's words, one at least."""
    words = text.split()
    return " ".join(words[: max(1, len(words) // 2)])


def _on_texts(model: EditableModel, rows: Rows, batch_tokens: int) -> list[tuple[str, float, int]]:
    nll = torch.zeros((), dtype=torch.float64, device=model.output_device)
    right = torch.zeros((), dtype=torch.int64, device=model.output_device)
    tokens = 0
    for batch in token_batches(model, [row for row in rows if len(row) > 1], batch_tokens):
        asking = batch.real.clone()
        asking.view(-1)[batch.last] = False
        read = asking.view(-1).nonzero().flatten()
        hidden = model.final(
            None,
            first=0,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
            read=read,
        )
        labels = batch.ids.view(-1)[read + 1].cpu().numpy()
        nlls, hits, _ = project(model, hidden, np.arange(len(labels)), labels)
        nll += nlls.double().sum()
        right += hits.sum()
        tokens += len(labels)
    means = (float(nll) / tokens, float(right) / tokens) if tokens else (math.nan, math.nan)
    return [("nll", means[0], tokens), ("token_accuracy", means[1], tokens)]


def _on_prompts(
    weights: EditedWeights, prompts: Sequence[str], rows: Rows, batch_tokens: int
) -> list[tuple[str, float, int]]:
    model = weights.model
    with weights.unedited():
        before = _last_states(model, rows, batch_tokens)
    after = _last_states(model, rows, batch_tokens)
    routed = None
    if model.router is not None:
        routes = model.router.routes(prompts)
        read = [routes.row(number, rows[number]) for number in routes.taken]
        routes.require_room(max(map(len, read), default=0))
        routed = routes, _last_states(routes.model, read, batch_tokens)
    kl, same = _compare(model, before, after, routed)
    count = len(rows)
    means = (float(kl.mean()), float(same.double().mean())) if count else (math.nan, math.nan)
    return [("kl", means[0], count), ("same_argmax", means[1], count)]


def _last_states(model: EditableModel, rows: Rows, batch_tokens: int) -> Tensor:
    """Normed state at the last token of each row: (rows, d)."""
    device = model.output_device
    states = torch.empty(len(rows), model.hidden_size, dtype=model.dtype, device=device)
    for batch in token_batches(model, rows, batch_tokens):
        states[batch.index.to(device)] = model.final(
            None,
            first=0,
            masks=batch.masks,
            position_ids=batch.positions,
            input_ids=batch.ids,
            read=batch.last,
        )
    return states


def _compare(
    model: EditableModel,
    before: Tensor,
    after: Tensor,
    routed: tuple[Routes, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(before || after) in float64 and equality of the argmax of each pair of states.

    Args:
        model: projects the states.
        before: (rows, d).
        after: (rows, d).
        routed: routes of the prompts, and the second model's states of those that it has a share
            in.
    """
    kl = torch.empty(len(before), dtype=torch.float64, device=before.device)
    same = torch.empty(len(before), dtype=torch.bool, device=before.device)
    # The difference of two like distributions is small: float32 would leave little of it.
    step = max(1, LOGIT_BYTES // (model.vocab_size * torch.float64.itemsize))
    for start in range(0, len(before), step):
        part = slice(start, start + step)
        old = model.logits(before[part]).double().log_softmax(-1)
        new = _with_share(model.logits(after[part]).double(), part, routed).log_softmax(-1)
        kl[part] = (old.exp() * (old - new)).sum(-1)
        # argmax finds something among logits that are not numbers, too.
        same[part] = (old.argmax(-1) == new.argmax(-1)) & kl[part].isfinite()
    return kl, same


def _with_share(logits: Tensor, part: slice, routed: tuple[Routes, Tensor] | None) -> Tensor:
    """Logits of some rows, with the second model's share where it has one."""
    if routed is None:
        return logits
    routes, states = routed
    inside = [(line, n) for line, n in enumerate(routes.taken) if part.start <= n < part.stop]
    if not inside:
        return logits
    lines, numbers = (torch.tensor(column) for column in zip(*inside, strict=True))
    rows = (numbers - part.start).to(logits.device)
    second = routes.model.logits(states[lines.to(states.device)]).to(logits)
    joint = mixed(logits[rows], second, routes.shares[numbers].to(logits.device))
    return logits.index_copy(0, rows, joint)


def _encode(
    model: EditableModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    limit: int | None,
) -> Rows:
    if not texts:
        return []
    limits = [n for n in (limit, model.max_positions) if n is not None]
    rows = token_ids(tokenizer, texts)
    return [row[: min(limits, default=None)] for row in rows if row]


def _row(round: int, name: str, layer: int | None, value: float, count: int) -> dict[str, Any]:
    return {"round": round, "measure": name, "layer": layer, "value": value, "count": count}


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
