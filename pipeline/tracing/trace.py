"""Tracing many facts: every token and layer of each, every kind of restoration."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.models.editable import EditableModel
from pipeline.models.kernels import fused_networks
from pipeline.tracing.facts import Fact
from pipeline.tracing.names import KINDS, Kind
from pipeline.tracing.recording import Recorded, record
from pipeline.tracing.runs import Known, Run, restored_run, units
from pipeline.tracing.wave import Wave

# A batch of facts leaves room for about so many runs of their longest token beside one another.
_RUNS_BESIDE = 4


@dataclass(frozen=True)
class TraceSettings:
    """What is traced.

    Attributes:
        noise: standard deviation of the noise on the subjects' token embeddings.
        samples: noise samples N, the same for every restored run.
        window: blocks in a window of MLP or attention outputs.
        kinds: kinds of restoration; severed ones need `state`.
        seed: seed of the noise.
    """

    noise: float
    samples: int = 10
    window: int = 10
    kinds: tuple[Kind, ...] = KINDS
    seed: int = 1


@dataclass(frozen=True)
class FactTrace:
    """What tracing found for one fact.

    Attributes:
        answer: the clean run's likeliest next token, whose probability all numbers are.
        clean: in the clean run; `corrupted`: mean over the noise samples, without restoration.
        restored: kind -> (T, L) float64, mean over the noise samples with the restoration at each
            token and layer; empty where the answer is not the expected one.
    """

    answer: int
    clean: float
    corrupted: float
    restored: dict[Kind, NDArray[np.float64]]


def trace(
    model: EditableModel, facts: Sequence[Fact], settings: TraceSettings, *, max_tokens: int
) -> list[FactTrace]:
    """Trace facts, in their order (ROME, arXiv 2202.05262, section 2.1 and appendix B).

    A fact whose answer is not the expected one is not traced beyond its two unrestored runs.

    Args:
        max_tokens: tokens in one batch, about; it decides a result's last bits.
    """
    assert "state" in settings.kinds or not any("severed" in kind for kind in settings.kinds)
    with torch.no_grad(), fused_networks(model):
        return _traced(model, facts, settings, max_tokens)


def _traced(
    model: EditableModel, facts: Sequence[Fact], settings: TraceSettings, max_tokens: int
) -> list[FactTrace]:
    found: dict[int, FactTrace] = {}
    for batch in _batches(facts, settings.samples, max_tokens):
        chosen = [facts[i] for i in batch]
        recorded = _record(model, chosen, settings)
        for i, one in zip(batch, _unrestored(recorded), strict=True):
            found[i] = one
        known = [i for i in batch if facts[i].expected in (None, found[i].answer)]
        if not known:
            continue
        if len(known) < len(batch):
            recorded = _record(model, [facts[i] for i in known], settings)
        maps = _maps(model, recorded, [facts[i] for i in known], settings, max_tokens)
        for number, i in enumerate(known):
            found[i].restored.update({kind: maps[kind][number] for kind in settings.kinds})
    return [found[i] for i in range(len(facts))]


def _batches(facts: Sequence[Fact], samples: int, max_tokens: int) -> Iterator[list[int]]:
    """Facts of equally many tokens: nothing is padded, and all rows have one mask."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        by_length[len(fact.ids)].append(index)
    for length, members in sorted(by_length.items()):
        # Tokens before a batch's first subject are not traced.
        members.sort(key=lambda index: facts[index].begin)
        size = max(1, max_tokens // (_RUNS_BESIDE * samples * length))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _record(model: EditableModel, facts: Sequence[Fact], settings: TraceSettings) -> Recorded:
    return record(
        model, facts, samples=settings.samples, noise=settings.noise, seed=settings.seed
    )  # fmt: skip


def _unrestored(recorded: Recorded) -> list[FactTrace]:
    answers = recorded.answers.tolist()
    clean = recorded.clean.double().tolist()
    corrupted = recorded.corrupted.double().mean(dim=1).tolist()
    return [FactTrace(*numbers, {}) for numbers in zip(answers, clean, corrupted, strict=True)]


def _maps(
    model: EditableModel,
    recorded: Recorded,
    facts: Sequence[Fact],
    settings: TraceSettings,
    max_tokens: int,
) -> dict[Kind, NDArray[np.float64]]:
    """Kind -> (F, T, L) probabilities."""
    tokens, layers = recorded.tokens, model.num_blocks
    corrupted = recorded.corrupted.double().mean(dim=1).cpu().numpy()
    known: dict[Known, NDArray[np.float64]] = {
        "clean": recorded.clean.double().cpu().numpy(),
        "corrupted": corrupted,
    }
    # Before its subject a fact's two runs are the same: there is nothing to restore.
    first = min(fact.begin for fact in facts)
    maps = {
        kind: np.repeat(corrupted, tokens * layers).reshape(len(facts), tokens, layers)
        for kind in settings.kinds
    }
    for token in range(first, tokens):
        runs: dict[tuple[Kind, int], Run | Known] = {
            (kind, layer): restored_run(
                kind,
                layer,
                num_blocks=layers,
                window=settings.window,
                is_last=token == tokens - 1,
            )
            for kind in settings.kinds
            for layer in range(layers)
        }
        means = _means(model, recorded, token, runs.values(), max_tokens)
        for (kind, layer), run in runs.items():
            maps[kind][:, token, layer] = means[run] if isinstance(run, Run) else known[run]
    for number, fact in enumerate(facts):
        for kind in settings.kinds:
            maps[kind][number, : fact.begin] = corrupted[number]
    return maps


def _means(
    model: EditableModel,
    recorded: Recorded,
    token: int,
    runs: Iterable[Run | Known],
    max_tokens: int,
) -> dict[Run, NDArray[np.float64]]:
    """Run -> (F,) mean over the noise samples, for the runs that are to be computed."""
    wave = Wave(model, recorded, token)
    room = max(1, max_tokens // (wave.rows * wave.suffix))
    found: dict[Run, torch.Tensor] = {}
    chunk: list[list[Run]] = []
    for unit in units([run for run in runs if isinstance(run, Run)]):
        if chunk and sum(map(len, chunk)) + len(unit) > room:
            found |= wave.probabilities(chunk)
            chunk = []
        chunk.append(unit)
    if chunk:
        found |= wave.probabilities(chunk)
    return {run: samples.double().mean(dim=1).cpu().numpy() for run, samples in found.items()}
