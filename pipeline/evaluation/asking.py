"""Asking probes of an edited model: scored, compared with the unedited one, and continued."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from pipeline.editing.update import EditedWeights
from pipeline.evaluation.generation import generate
from pipeline.evaluation.metrics import Score
from pipeline.evaluation.probes import Probe
from pipeline.evaluation.scoring import score
from pipeline.spec import EvaluationSpec

_NOT_SCORED = Score(None, None, None, None)


def scores_of(
    weights: EditedWeights,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Probe],
    *,
    max_tokens: int,
    compared: Collection[str] = ("locality",),
) -> list[Score]:
    """Score probes as the model is now, in their order; a generation probe has no score.

    What the unedited model says to the `compared` kinds of probe, locality or neighborhood, is
    asked of the pristine weights, put back for that long; at version 0 there is nothing to compare,
    and `unchanged` stays None.
    """

    def asked_now(chosen: Sequence[int]) -> dict[int, Score]:
        probes = [asked[i] for i in chosen]
        found = score(weights.model, tokenizer, probes, max_tokens=max_tokens)
        return dict(zip(chosen, found, strict=True))

    scores = asked_now([i for i, probe in enumerate(asked) if probe.kind != "generation"])
    beside = [i for i, probe in enumerate(asked) if probe.kind in compared]
    if beside and weights.version:
        with weights.unedited():
            before = asked_now(beside)
        for i in beside:
            said = scores[i].predicted
            unchanged = said is not None and said == before[i].predicted
            scores[i] = replace(scores[i], unchanged=unchanged)
    return [scores.get(i, _NOT_SCORED) for i in range(len(asked))]


def continuations_of(
    weights: EditedWeights,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Probe],
    settings: EvaluationSpec,
    *,
    max_tokens: int,
) -> list[str | None]:
    """Continue generation probes, and rewrites and paraphrases if asked; None for the others."""
    texts: dict[int, str] = {}
    kinds: dict[str, tuple[str, ...]] = {"fluency_tokens": ("generation",)}
    if settings.generate:
        kinds["generate_tokens"] = ("rewrite", "paraphrase")
    for setting, continued in kinds.items():
        chosen = [i for i, probe in enumerate(asked) if probe.kind in continued]
        found = generate(
            weights.model,
            tokenizer,
            [asked[i].prompt for i in chosen],
            max_new_tokens=getattr(settings, setting),
            batch_tokens=max_tokens,
            setting=setting,
        )
        texts.update(zip(chosen, found, strict=True))
    return [texts.get(i) for i in range(len(asked))]
