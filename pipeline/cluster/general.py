"""Measuring what the rest of the model lost: held-out texts to workers, one part a round."""

import logging
import re
from collections.abc import Iterable, Sequence

import pyarrow as pa

from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.shards import Shard
from pipeline.errors import InputError
from pipeline.evaluation.general import combine, neutral_prompt
from pipeline.requests import EditRequest
from pipeline.results.store import RunStore
from pipeline.sources.corpus import corpus_digest, read_corpus
from pipeline.spec import JobSpec

log = logging.getLogger(__name__)

# Part of the result's last bits, so it does not follow the worker count.
_TEXTS_PER_SHARD = 64
# Texts are drawn beyond those wanted, since some name an edited subject.
_SPARE = 2
_WORD = re.compile(r"\w+")


def held_out_texts(spec: JobSpec, requests: Sequence[EditRequest]) -> tuple[str, ...]:
    """Draw the texts of `evaluation.general` that name no edited subject; none if it is off.

    Raises:
        InputError: the corpus cannot be read, or every text of it names an edited subject.
    """
    settings = spec.evaluation.general
    if settings.corpus is None:
        return ()
    drawn = read_corpus(
        settings.corpus,
        field=settings.field,
        samples=_SPARE * settings.texts,
        seed=spec.seed,
        setting="evaluation.general",
    )
    texts = without_subjects(drawn, (request.subject for request in requests))[: settings.texts]
    if not texts:
        raise InputError(
            f"{settings.corpus}: every text that was drawn names an edited subject; give another"
            " evaluation.general.corpus"
        )
    if len(texts) < settings.texts:
        log.warning(
            "evaluation.general: %d texts instead of %d: %s has no more that name no edited subject"
            " among the %d drawn",
            len(texts),
            settings.texts,
            settings.corpus,
            len(drawn),
        )
    return tuple(texts)


def without_subjects(texts: Sequence[str], subjects: Iterable[str]) -> list[str]:
    """The texts in which no subject stands, compared by words and without case."""
    named = {tuple(_WORD.findall(subject.casefold())) for subject in subjects} - {()}
    lengths = {len(words) for words in named}

    def is_free(text: str) -> bool:
        words = _WORD.findall(text.casefold())
        return not any(
            tuple(words[start : start + length]) in named
            for length in lengths
            for start in range(len(words) - length + 1)
        )

    return [text for text in texts if is_free(text)]


def held_out_entry(texts: Sequence[str]) -> dict[str, int | str] | None:
    """What a manifest says about the held-out texts, to be compared on resuming."""
    return {"texts": len(texts), "sha256": corpus_digest(texts)} if texts else None


def measure_general(
    scheduler: Scheduler,
    store: RunStore,
    texts: Sequence[str],
    progress: PhaseProgress,
    *,
    round: int,
) -> None:
    """Measure the model as it is and write the round's part of general/, if it is not there yet.

    Without texts nothing is measured. A neutral prompt is the first half of a text.

    Args:
        texts: what `held_out_texts` returned.
        round: the round after which the model is measured, -1 for the unedited one.
    """
    if not texts or store.has_part("general", round, 0):
        return
    shards = [
        Shard(index, tuple(texts[start : start + _TEXTS_PER_SHARD]))
        for index, start in enumerate(range(0, len(texts), _TEXTS_PER_SHARD))
    ]
    found: dict[int, pa.Table] = {}
    with progress.phase("general", len(texts)) as ticker:
        outcomes = scheduler.run(
            "measure_general",
            shards,
            lambda _, items: (items, [neutral_prompt(text) for text in items]),
            split=False,
            version=scheduler.version,
            round=round,
        )
        for outcome in outcomes:
            found[outcome.shard.index] = outcome.done[0].result
            ticker.advance(len(outcome.shard.items))
    store.write_part(
        "general",
        combine([found[index] for index in sorted(found)]),
        round=round,
        shard=0,
        weight_version=scheduler.version,
    )
