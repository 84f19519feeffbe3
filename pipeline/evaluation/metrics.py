"""What the figures mean: every definition of the evaluation, with its source.

Success, ES, PS, NS, S: Meng et al., "Locating and Editing Factual Associations in GPT" (ROME,
arXiv 2202.05262), the evaluation on CounterFact, as the code published with it computes them:
likelihoods are means over an answer's tokens, a score is the mean over edits of the mean over an
edit's probes. ES, PS and NS are the success of rewrite, paraphrase and neighborhood probes, S is
the harmonic mean of the three.

Exact: Yao et al., "Editing Large Language Models" (arXiv 2305.13172), who count an answer when it
is the model's argmax. Here all of an answer's tokens must be, each given the prompt and the tokens
before it. zsRE results (ROME's code, EasyEdit's `rewrite_acc`) average over tokens instead, so for
answers of several tokens they are higher.

Unchanged: locality as EasyEdit computes it (Yao et al., arXiv 2305.13172; Zhang et al., arXiv
2401.01286): on a question beside the edit, the edited model's argmax at every token of the answer,
given those before it, is the unedited model's, whether right or wrong. EasyEdit averages over an
answer's tokens; here all of them must be the same. Of an edited model only, and of the kinds of
probe that `evaluation.unchanged` names.

Portability (arXiv 2305.13172): questions whose answer follows from the new fact, judged by Exact,
and by success where the answer of before the edit is known; `aspect` says what kind of question
(subject alias, reversed, one hop, ...).

What generated texts are measured by stands in `pipeline.evaluation.texts`, intervals in
`pipeline.evaluation.intervals`, what the rest of the model lost in `pipeline.evaluation.general`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.evaluation.intervals import Floats, bootstrap_means, bounds, percentiles
from pipeline.evaluation.probes import Probe
from pipeline.evaluation.texts import exact_match, matches, ngram_entropy
from pipeline.results.schemas import PROBES

SCORES = {"ES": "rewrite", "PS": "paraphrase", "NS": "neighborhood"}
"""The kind of probe whose success each score is."""

_ANSWER_IS_TRUE = frozenset({"neighborhood", "locality"})


@dataclass(frozen=True)
class Score:
    """What the model says to one probe.

    Attributes:
        nll_new: mean negative log-likelihood of a token of `target_new`, in nats; None without one.
            Not a number if the model's logits are not.
        nll_true: the same of `target_true`.
        success: see `is_success`.
        exact: see `exact`.
        predicted: ids that are the argmax at each token of the answer to a locality or neighborhood
            probe, given those before it; None for other probes.
        unchanged: whether they are those of the unedited model; None where not asked.
    """

    nll_new: float | None
    nll_true: float | None
    success: bool | None
    exact: bool | None
    predicted: tuple[int, ...] | None = None
    unchanged: bool | None = None


def is_success(kind: str, nll_new: float | None, nll_true: float | None) -> bool | None:
    """Say whether the answer that shall win is the likelier one (ROME); None when one is missing.

    That is `target_new`, and `target_true` for a neighborhood probe. A tie is no success, and
    neither is a likelihood that is not a number.
    """
    if nll_new is None or nll_true is None:
        return None
    return nll_true < nll_new if kind == "neighborhood" else nll_new < nll_true


def exact(kind: str, exact_new: bool | None, exact_true: bool | None) -> bool | None:
    """Choose the exact match of the answer that is `expected`; None without one."""
    return exact_true if kind in _ANSWER_IS_TRUE else exact_new


def expected(probe: Probe) -> str | None:
    """The answer that the edited model shall give: for a question beside the edit `target_true`."""
    return probe.target_true if probe.kind in _ANSWER_IS_TRUE else probe.target_new


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of numbers that are not negative; 0 when one of them is 0."""
    if min(values) <= 0.0:
        return 0.0
    return len(values) / math.fsum(1.0 / value for value in values)


def rows(
    probes: Sequence[Probe],
    scores: Sequence[Score],
    *,
    round: int,
    edit_rounds: Sequence[int],
    generated: Sequence[str | None] | None = None,
) -> list[dict[str, Any]]:
    """Write scored probes as rows of metrics/*.parquet.

    Args:
        round: the round after which the model was scored, -1 for the unedited one.
        edit_rounds: for each probe, the round that its edit belongs to; -1 for a fact that is
            never edited.
        generated: a continuation for each probe, None where there is none.
    """
    texts = [None] * len(probes) if generated is None else generated
    return [
        {
            "round": round,
            "edit_round": edit_round,
            "case_id": probe.case_id,
            "probe": probe.kind,
            "probe_index": probe.index,
            "prompt": probe.prompt,
            "target_new": probe.target_new,
            "target_true": probe.target_true,
            "nll_new": score.nll_new,
            "nll_true": score.nll_true,
            "success": score.success,
            "exact": score.exact,
            "generated": text,
            **_of_text(text, expected(probe)),
            "aspect": probe.aspect,
            "unchanged": score.unchanged,
        }
        for probe, edit_round, score, text in zip(probes, edit_rounds, scores, texts, strict=True)
    ]


def summarise(metrics: pa.Table) -> dict[str, Any]:
    """Aggregate a METRICS table: plain JSON, no number that is not finite.

    Returns:
        `{"rounds": [...]}`, one entry a round in ascending order (-1 is the unedited model):
        `round`, `edits`, `ES`, `PS`, `NS`, `S`, and `probes`: for each kind of probe `edits`,
        `probes`, `success`, `exact`, `generated_match`, `generated_exact`, `unchanged`, `fluency`,
        `probability_new`, `probability_true`. Probes that have an aspect are also counted under
        `kind: aspect`.

        A score is `{"score", "low", "high"}` in per cent, or None when no probe defines it; S needs
        all three. A probability is exp(-nll), that of a mean token, averaged like the scores; a
        likelihood that is not a number counts as probability 0.
    """
    means = _means_by_edit(metrics)
    rounds = np.unique(means["round"])
    return {"rounds": [_summarise_round(means, int(number)) for number in rounds]}


def exact_of(entry: dict[str, Any], kind: str) -> dict[str, float] | None:
    """The `exact` score of a kind of probe in an entry of `summarise`; None where none has one."""
    probe = entry["probes"].get(kind)
    return None if probe is None else probe.get("exact")


_SHARES = ("success", "exact", "generated_match", "generated_exact", "unchanged")
_COLUMNS = (*_SHARES, "fluency", "probability_new", "probability_true")


def _means_by_edit(metrics: pa.Table) -> dict[str, NDArray[Any]]:
    """Mean of every measured column and count of probes, for each (round, kind, edit)."""
    columns = {
        "round": metrics["round"],
        "probe": metrics["probe"],
        "case_id": metrics["case_id"],
        "aspect": _column(metrics, "aspect", pa.string()),
        **{name: _numbers(metrics, name) for name in (*_SHARES, "fluency")},
        "probability_new": _probability(metrics["nll_new"]),
        "probability_true": _probability(metrics["nll_true"]),
    }
    grouped = (
        _with_aspects(pa.table(columns))
        .group_by(["round", "probe", "case_id"], use_threads=False)  # sums in one order
        .aggregate([*((name, "mean") for name in _COLUMNS), ([], "count_all")])
    )
    # Numbered by name, so that the bootstrap's draws do not depend on the order of the rows.
    _, edits = np.unique(grouped["case_id"].to_numpy(), return_inverse=True)
    return {
        "round": grouped["round"].to_numpy(),
        "probe": grouped["probe"].to_numpy(),
        "edit": edits,
        "probes": grouped["count_all"].to_numpy(),
        **{name: grouped[f"{name}_mean"].to_numpy() for name in _COLUMNS},
    }


def _numbers(metrics: pa.Table, name: str) -> pa.ChunkedArray:
    return _column(metrics, name, pa.float64()).cast(pa.float64())


def _column(metrics: pa.Table, name: str, type_: pa.DataType) -> pa.ChunkedArray:
    """A column, or nulls: a caller may have read only those that it needs."""
    if name in metrics.column_names:
        return metrics[name]
    return pa.chunked_array([pa.nulls(metrics.num_rows, type_)])


def _with_aspects(table: pa.Table) -> pa.Table:
    """Every probe that has an aspect a second time, as one of the kind `kind: aspect`."""
    chosen = table.filter(pc.is_valid(table["aspect"]))
    named = pc.binary_join_element_wise(chosen["probe"], chosen["aspect"], ": ")
    chosen = chosen.set_column(chosen.column_names.index("probe"), "probe", named)
    return pa.concat_tables([table, chosen]) if chosen.num_rows else table


def _probability(nll: pa.ChunkedArray) -> pa.ChunkedArray:
    probability = pc.exp(pc.negate(nll.cast(pa.float64())))
    return pc.if_else(pc.is_nan(probability), 0.0, probability)


def _summarise_round(means: Mapping[str, NDArray[Any]], number: int) -> dict[str, Any]:
    chosen = means["round"] == number
    here = {name: values[chosen] for name, values in means.items()}
    edits, here["edit"] = np.unique(here["edit"], return_inverse=True)
    present = set(here["probe"].tolist())
    kinds = [kind for kind in PROBES if kind in present] + sorted(present - set(PROBES))
    table = np.full((len(edits), len(kinds), len(_COLUMNS)), np.nan)
    for k, kind in enumerate(kinds):
        of_kind = here["probe"] == kind
        for c, name in enumerate(_COLUMNS):
            table[here["edit"][of_kind], k, c] = here[name][of_kind]
    resampled = bootstrap_means(table.reshape(len(edits), -1)).reshape(-1, *table.shape[1:])
    probes = {
        kind: _summarise_kind(here, table[:, k], resampled[:, k], kind)
        for k, kind in enumerate(kinds)
    }
    scores = {
        name: probes[kind]["success"] if kind in probes else None for name, kind in SCORES.items()
    }
    found = [score["score"] for score in scores.values() if score is not None]
    combined = None
    if len(found) == len(SCORES):
        draws = resampled[:, [kinds.index(kind) for kind in SCORES.values()], 0]
        combined = _combined(found, draws)
    return {"round": number, "edits": len(edits), **scores, "S": combined, "probes": probes}


def _summarise_kind(
    here: Mapping[str, NDArray[Any]], values: Floats, resampled: Floats, kind: str
) -> dict[str, Any]:
    """Aggregate one kind of probe.

    `values` is (edits, columns), not a number where an edit has none; `resampled` (draws, columns).
    """
    of_kind = here["probe"] == kind
    result: dict[str, Any] = {
        "edits": int(of_kind.sum()),
        "probes": int(here["probes"][of_kind].sum()),
    }
    for c, name in enumerate(_COLUMNS):
        known = values[~np.isnan(values[:, c]), c]
        if not known.size:
            result[name] = None
        elif name not in _SHARES:
            result[name] = float(known.mean())
        else:
            result[name] = _score(float(known.mean()), bounds(known, resampled[:, c]))
    return result


def _combined(percentages: Sequence[float], draws: Floats) -> dict[str, float]:
    """S, and its interval from the same draws of edits for all three scores."""
    means = np.array([harmonic_mean(draw) for draw in draws.tolist() if not np.isnan(draw).any()])
    return _score(harmonic_mean(percentages) / 100.0, percentiles(means))


def _score(mean: float, bounds: tuple[float, float]) -> dict[str, float]:
    # Rounding may put a bound on the wrong side of the mean that it equals.
    low, high = min(bounds[0], mean), max(bounds[1], mean)
    return {"score": 100.0 * mean, "low": 100.0 * low, "high": 100.0 * high}


def _of_text(text: str | None, target: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    judged = {"fluency": ngram_entropy(text)}
    if target is None:
        return judged
    return judged | {
        "generated_match": matches(text, target),
        "generated_exact": exact_match(text, target),
    }
