"""The covariance phase: reuse what fits, compute the rest on the workers, keep it on disk."""

import hashlib
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.shards import Shard
from pipeline.covariances import (
    CovarianceIdentity,
    default_directory,
    load_covariances,
    write_covariance,
)
from pipeline.editing.covariance import GramSums
from pipeline.errors import InputError
from pipeline.models.loading import display_name, load_config, load_tokenizer
from pipeline.sources.corpus import corpus_digest, read_corpus
from pipeline.spec import JobSpec

log = logging.getLogger(__name__)

# Part of the result's last bits, so these do not follow the worker count.
_MAX_SHARDS = 8
_MIN_TEXTS_PER_SHARD = 64
# A covariance from fewer tokens than this many times F has hardly settled (arXiv 2506.04226
# finds 2 F to 10 F enough).
_TOKENS_PER_KEY_ENTRY = 2
_NULL_SPACE_TOKENS = 5
AMPLE_TOKENS_PER_KEY_ENTRY = 10
_TEXTS_TO_ESTIMATE_FROM = 256


@dataclass(frozen=True)
class Covariances:
    """Layer -> C, (F, F) float64, with where each came from and how many tokens it is made of."""

    matrices: dict[int, Tensor]
    tokens: dict[int, int]
    directory: Path

    def digests(self) -> dict[str, str]:
        """Layer, as text, -> SHA-256 in hexadecimal of its matrix."""
        return {
            str(layer): hashlib.sha256(matrix.contiguous().numpy().data).hexdigest()
            for layer, matrix in sorted(self.matrices.items())
        }


def ensure_covariances(
    spec: JobSpec, scheduler: Scheduler, worker: WorkerDescription, progress: PhaseProgress
) -> Covariances:
    """Return the covariance of every edited layer, computing what is not on disk yet.

    Raises:
        InputError: covariances are missing and the spec names no corpus.
        FingerprintMismatchError: what is at `covariance.path` was made for something else.
    """
    layers = spec.method.layers
    assert layers is not None
    settings = spec.covariance
    texts: list[str] = []
    if settings.corpus is not None:
        samples = settings.samples
        if samples == "auto":
            samples = _enough_samples(spec, max(worker.key_sizes.values()))
        texts = read_corpus(settings.corpus, field=settings.field, samples=samples, seed=spec.seed)
    identity = CovarianceIdentity(
        fingerprint=worker.fingerprint,
        corpus=settings.corpus,
        corpus_digest=corpus_digest(texts) if texts else None,
        samples=len(texts) or None,
        max_tokens=settings.max_tokens,
        dtype=worker.dtype,
    )
    directory = (
        default_directory(identity, display_name(spec.model))
        if settings.path is None
        else Path(settings.path)
    )
    matrices, tokens, missing = load_covariances(
        directory, layers, worker.key_sizes, worker.weight_names, identity
    )
    if missing:
        if not texts:
            raise InputError(
                f"covariance: layers {missing} are not in {directory}; give covariance.corpus to"
                " compute them, or covariance.path to where they are"
            )
        sums = _compute(scheduler, texts, settings.max_tokens, progress)
        for layer, matrix in sums.covariances().items():
            write_covariance(directory, layer, matrix, tokens=sums.tokens, identity=identity)
            matrices[layer], tokens[layer] = matrix, sums.tokens
    else:
        log.info("covariance: reused from %s", directory)
    # Too few tokens make a null space that is not there.
    few = _NULL_SPACE_TOKENS if spec.method.name == "alphaedit" else _TOKENS_PER_KEY_ENTRY
    _warn_if_few(tokens, worker.key_sizes, few)
    return Covariances(matrices, tokens, directory)


def _enough_samples(spec: JobSpec, key_size: int) -> int:
    """Texts that hold about 10 tokens for every entry of a key (arXiv 2506.04226, section 4)."""
    mean = mean_tokens(spec)
    samples = math.ceil(AMPLE_TOKENS_PER_KEY_ENTRY * key_size / mean)
    log.info(
        "covariance.samples: auto takes %d texts of about %.1f tokens, %d for each of the %d"
        " entries of a key",
        samples,
        mean,
        AMPLE_TOKENS_PER_KEY_ENTRY,
        key_size,
    )
    return samples


def mean_tokens(spec: JobSpec) -> float:
    """Tokens that a text of the corpus has on average, cut as the spec says; 1 at least."""
    settings = spec.covariance
    assert settings.corpus is not None
    some = read_corpus(
        settings.corpus, field=settings.field, samples=_TEXTS_TO_ESTIMATE_FROM, seed=spec.seed
    )
    config = load_config(spec.model).get_text_config()
    limits = (settings.max_tokens, getattr(config, "max_position_embeddings", None))
    longest = min((limit for limit in limits if limit is not None), default=sys.maxsize)
    rows = load_tokenizer(spec.model)(some)["input_ids"]
    return max(1.0, sum(min(len(row), longest) for row in rows) / len(rows))


def _compute(
    scheduler: Scheduler, texts: list[str], max_tokens: int | None, progress: PhaseProgress
) -> GramSums:
    """One pass over the corpus for all layers; shards are added up in their order."""
    shards = text_shards(texts)
    early: dict[int, GramSums] = {}
    total: GramSums | None = None
    following = 0
    with progress.phase("covariance", len(texts)) as ticker:
        outcomes = scheduler.run(
            "covariance", shards, lambda _, items: (items, max_tokens), split=False
        )
        for outcome in outcomes:
            early[outcome.shard.index] = outcome.done.pop().result
            # The sums of wide layers are gigabytes: only those that came too early are kept.
            while following in early:
                sums = early.pop(following)
                if total is None:
                    total = sums
                else:
                    total.add(sums)
                following += 1
            ticker.advance(len(outcome.shard.items))
    assert total is not None
    return total


def text_shards(texts: Sequence[Any]) -> list[Shard]:
    """Cut a corpus into the shards that workers sum over."""
    size = max(_MIN_TEXTS_PER_SHARD, -(-len(texts) // _MAX_SHARDS))
    return [
        Shard(index, tuple(texts[start : start + size]))
        for index, start in enumerate(range(0, len(texts), size))
    ]


def _warn_if_few(tokens: dict[int, int], key_sizes: dict[int, int], few: int) -> None:
    for layer, count in sorted(tokens.items()):
        enough = few * key_sizes[layer]
        if count < enough:
            log.warning(
                "covariance of layer %d: %d tokens for keys of %d entries; take at least %d",
                layer,
                count,
                key_sizes[layer],
                enough,
            )
