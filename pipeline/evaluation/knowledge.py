"""Contrastive knowledge assessment (CKA, arXiv 2210.03329): which facts a model holds.

A fact is held where its object is likelier behind its relation's prompt than behind prompts of
other relations about the same subject:

    (P(object | prompt) + alpha) / (mean over contrastive prompts of P(object | prompt) + alpha).

P is the product over the object's tokens, or that of its first token.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.editing.batching import token_batches
from pipeline.editing.targets import TargetBatch, TargetRow, sources_of, target_row
from pipeline.models.editable import EditableModel
from pipeline.prompts import encode_targets, token_ids
from pipeline.requests import EditRequest
from pipeline.results.schemas import conform
from pipeline.spec import AssessSpec

Objects = Literal["object", "first_token"]


@dataclass(frozen=True)
class Assessed:
    """How likely a fact's object is.

    Attributes:
        probability: behind the fact's own prompt.
        contrastive: behind each contrastive prompt.
    """

    probability: float
    contrastive: tuple[float, ...]

    def score(self, smoothing: float) -> float | None:
        """The ratio; None where it is 0 / 0."""
        below = sum(self.contrastive) / len(self.contrastive) + smoothing
        above = self.probability + smoothing
        if below == 0.0:
            return None if above == 0.0 else float("inf")
        return above / below


def draw_contrasts(
    requests: Sequence[EditRequest], count: int, seed: int
) -> dict[str, tuple[str, ...]]:
    """Prompts of other relations for every request, with its subject in them.

    A relation is a `relation_id`, or a prompt of its own where a request has none; its prompt is
    that of the first request of it. What is drawn for a request follows from the seed, its case_id
    and the relations, and not from the other requests' order.

    Args:
        requests: the facts.
        count: prompts of each; fewer where there are fewer other relations.
        seed: the job's.

    Returns:
        case_id -> prompts, none where there is one relation only.
    """
    prompts: dict[str, str] = {}
    for request in requests:
        prompts.setdefault(_relation(request), request.prompt)
    relations = sorted(prompts)
    found = {}
    for request in requests:
        others = [name for name in relations if name != _relation(request)]
        generator = random.Random(f"{seed} assess {request.case_id}")
        chosen = generator.sample(others, min(count, len(others)))
        found[request.case_id] = tuple(
            prompts[name].replace("{}", request.subject, 1) for name in chosen
        )
    return found


def _relation(request: EditRequest) -> str:
    return request.prompt if request.relation_id is None else request.relation_id


@torch.inference_mode()
def assess(
    model: EditableModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[str]],
    objects: Sequence[str],
    read: Objects,
    max_tokens: int,
) -> list[Assessed]:
    """Measure how likely objects are.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: of each fact: its own prompt, then the contrastive ones, at least one.
        objects: of each fact.
        read: what of an object counts.
        max_tokens: tokens in one pass.

    Raises:
        ValueError: a probability is not a number.
    """
    texts = token_ids(tokenizer, [text for of_fact in prompts for text in of_fact])
    targets = encode_targets(tokenizer, objects, model.answers)
    wanted = [target[:1] if read == "first_token" else target for target in targets]
    of_text = [fact for fact, of_fact in enumerate(prompts) for _ in of_fact]
    start = model.answers.start
    # The weight makes the loss the sum over tokens.
    rows = [
        target_row(fact, tuple(ids), wanted[fact], float(len(wanted[fact])), start)
        for fact, ids in zip(of_text, texts, strict=True)
    ]
    found = _probabilities(model, rows, max_tokens).tolist()
    if not all(0.0 <= probability <= 1.0 + 1e-6 for probability in found):
        raise ValueError("the model's probabilities are not numbers")
    places = iter(found)
    return [Assessed(next(places), tuple(next(places) for _ in of_fact[1:])) for of_fact in prompts]


def assessment_rows(
    model: EditableModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    contrasts: Sequence[Sequence[str]],
    settings: AssessSpec,
    max_tokens: int,
) -> tuple[pa.Table, dict[str, str]]:
    """Rows of assessment/, and case_id -> why of the requests without the object that is asked for.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        requests: the facts.
        contrasts: prompts of other relations about each fact's subject.
        settings: how to assess.
        max_tokens: tokens in one pass.
    """
    pairs = [
        (request, tuple(others), getattr(request, settings.object))
        for request, others in zip(requests, contrasts, strict=True)
    ]
    known = [pair for pair in pairs if pair[2] is not None]
    prompts = [(request.text, *others) for request, others, _ in known]
    objects = [wanted for _, _, wanted in known]
    found = assess(model, tokenizer, prompts, objects, settings.read, max_tokens)
    rows = [
        _fact(request, others, wanted, one, settings)
        for (request, others, wanted), one in zip(known, found, strict=True)
    ]
    skipped = {
        request.case_id: f"skipped: it has no {settings.object}"
        for request, _, wanted in pairs
        if wanted is None
    }
    return conform("assessment", rows), skipped


def _fact(
    request: EditRequest,
    contrasts: tuple[str, ...],
    wanted: str,
    found: Assessed,
    settings: AssessSpec,
) -> dict[str, Any]:
    score = found.score(settings.smoothing)
    return {
        "round": -1,
        "case_id": request.case_id,
        "relation_id": request.relation_id,
        "subject": request.subject,
        "prompt": request.text,
        "object": wanted,
        "contrasts": list(contrasts),
        "probability": found.probability,
        "contrastive": sum(found.contrastive) / len(found.contrastive),
        "score": score,
        "is_held": score is not None and score > settings.threshold,
    }


def _probabilities(model: EditableModel, rows: Sequence[TargetRow], max_tokens: int) -> Tensor:
    """P(target) of every row, float64."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    ids, sources = [row.ids for row in rows], sources_of(rows)
    for batch in token_batches(model, ids, max_tokens, sources):
        targets = TargetBatch.of(batch, rows, model.output_device)
        given: dict[str, Any] = {"masks": batch.masks, "position_ids": batch.positions}
        states = model.final(None, first=0, input_ids=batch.ids, read=targets.read, **given)
        found[batch.index] = (-targets.losses(model, states).double().cpu()).exp()
    return found
