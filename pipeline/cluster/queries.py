"""Gathering what a method remembers of the unedited model: queries of a corpus's tokens."""

import hashlib
import logging
import math

import numpy as np

from pipeline.cluster.covariance import mean_tokens, text_shards
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Scheduler
from pipeline.editing.queries import queries_of
from pipeline.errors import InputError
from pipeline.models.answers import answer_form
from pipeline.models.loading import load_config
from pipeline.sources.corpus import read_corpus
from pipeline.spec import JobSpec

log = logging.getLogger(__name__)

# Texts are drawn by their mean length, which a few of them tell to some per cent.
_MARGIN = 1.2


def gather_queries(
    spec: JobSpec, scheduler: Scheduler, progress: PhaseProgress, count: int
) -> np.ndarray:
    """Queries at the edited block of the unedited model, evenly spaced among a corpus's tokens.

    The same bits however many workers there are.

    Args:
        spec: the resolved spec; `covariance` names the corpus.
        scheduler: its workers are at version 0.
        progress: shows how far it is.
        count: how many are wanted; fewer where the corpus holds fewer.

    Returns:
        (count, D) float32.

    Raises:
        InputError: the spec names no corpus.
    """
    settings = spec.covariance
    if settings.corpus is None:
        raise InputError(
            f"method.{spec.method.name}: its memory is made of a corpus; give covariance.corpus,"
            f" or set method.{spec.method.name}.memory_queries and watched_queries to 0"
        )
    if isinstance(settings.samples, int):
        samples = settings.samples
    else:
        of_text = queries_of(mean_tokens(spec), answer_form(load_config(spec.model)))
        samples = math.ceil(_MARGIN * count / max(1.0, of_text))
    texts = read_corpus(settings.corpus, field=settings.field, samples=samples, seed=spec.seed)
    found: dict[int, np.ndarray] = {}
    with progress.phase("memory", len(texts)) as ticker:
        outcomes = scheduler.run(
            "queries",
            text_shards(texts),
            lambda _, items: (items, settings.max_tokens),
            split=False,
        )
        for outcome in outcomes:
            found[outcome.shard.index] = outcome.done[0].result
            ticker.advance(len(outcome.shard.items))
    queries = np.concatenate([found[index] for index in sorted(found)])
    if len(queries) < count:
        log.warning("memory: the corpus makes %d queries, %d are wanted", len(queries), count)
        return queries
    return np.ascontiguousarray(queries[np.linspace(0, len(queries) - 1, count).astype(int)])


def digest(queries: np.ndarray) -> str:
    """SHA-256 of queries, in hexadecimal."""
    return hashlib.sha256(queries.data).hexdigest()
