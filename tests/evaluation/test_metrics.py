"""Definitions of the figures, their intervals, and the summary of a metrics table."""

import json
import math
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.intervals import interval
from pipeline.evaluation.metrics import (
    Score,
    exact,
    expected,
    harmonic_mean,
    is_success,
    rows,
    summarise,
)
from pipeline.evaluation.probes import Probe
from pipeline.results.schemas import conform

NLL = st.floats(0, 50)


@given(NLL, NLL)
def test_success_is_the_likelier_answer(nll_new: float, nll_true: float) -> None:
    assert is_success("rewrite", nll_new, nll_true) is (nll_new < nll_true)
    assert is_success("paraphrase", nll_new, nll_true) is (nll_new < nll_true)
    assert is_success("neighborhood", nll_new, nll_true) is is_success("rewrite", nll_true, nll_new)


@pytest.mark.parametrize("kind", ["rewrite", "neighborhood"])
def test_no_success_without_two_numbers_that_differ(kind: str) -> None:
    assert is_success(kind, 1.0, None) is None
    assert is_success(kind, None, 1.0) is None
    assert is_success(kind, 1.0, 1.0) is False
    assert is_success(kind, math.nan, 1.0) is False
    assert is_success(kind, 1.0, math.nan) is False


def test_exact_is_of_the_answer_that_is_expected() -> None:
    for kind in ("rewrite", "paraphrase", "portability"):
        assert exact(kind, True, False) is True
        assert expected(Probe("0", kind, 0, "p", "new", "true")) == "new"
    for kind in ("neighborhood", "locality"):
        assert exact(kind, True, False) is False
        assert exact(kind, True, None) is None
        assert expected(Probe("0", kind, 0, "p", "new", "true")) == "true"


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=5), st.floats(0.1, 10))
def test_harmonic_mean_identities(values: list[float], scale: float) -> None:
    mean = harmonic_mean(values)
    assert min(values) * (1 - 1e-12) <= mean <= max(values) * (1 + 1e-12)
    assert mean <= math.fsum(values) / len(values) * (1 + 1e-12)
    assert harmonic_mean([scale * value for value in values]) == pytest.approx(scale * mean)
    assert harmonic_mean(values[::-1]) == pytest.approx(mean)
    assert harmonic_mean([*values, 0.0]) == 0.0


def test_the_harmonic_mean_of_a_published_row() -> None:
    """counterfact-12m's README: 75.3, 71.6 and 95.2 make 79.5."""
    assert harmonic_mean([75.3, 71.6, 95.2]) == pytest.approx(79.5, abs=0.05)


def test_wilson_interval_of_a_textbook_case() -> None:
    """81 of 263: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3)."""
    low, high = interval([1.0] * 81 + [0.0] * 182)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert interval([1.0] * 10)[1] == 1.0 and interval([0.0] * 1000)[0] == 0.0
    low, high = interval([1.0] * 10)
    assert high == pytest.approx(1.0) and 0.6 < low < 0.8


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 8).map(lambda count: count / 8), min_size=1, max_size=40))
def test_an_interval_holds_its_mean_and_mirrors(values: list[float]) -> None:
    low, high = interval(values)
    assert 0 <= low <= np.mean(values) <= high <= 1 + 1e-12
    assert interval(values) == (low, high)
    mirrored_low, mirrored_high = interval([1 - value for value in values])
    assert (mirrored_low, mirrored_high) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("binary", [True, False])
def test_intervals_cover_the_truth_about_95_times_in_100(binary: bool) -> None:
    generator = np.random.default_rng(3)
    truth, covered, widths = 0.7, 0, []
    for _ in range(200):
        chance = generator.beta(7, 3, size=60)  # edits differ; the mean of all is 0.7
        trials = 1 if binary else 10
        low, high = interval(generator.binomial(trials, chance) / trials)
        covered += low <= truth <= high
        widths.append(high - low)
    assert 0.89 * 200 <= covered <= 0.995 * 200
    assert np.mean(widths) < 0.25


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        interval([])


def test_rows_have_the_schema_of_the_metrics_table() -> None:
    probes = [
        Probe("0", "rewrite", 0, "The capital is", "Paris", "Rome"),
        Probe("0", "neighborhood", 3, "The tower is in", "Paris", "Rome"),
        Probe("0", "locality", 1, "It is", None, "Rome"),
        Probe("1", "rewrite", 0, "He is", "Paris", None),
    ]
    scores = [
        Score(0.5, 2.0, True, False),
        Score(0.5, 2.0, False, True),
        Score(None, 1.0, None, True),
        Score(1.5, None, None, False),
    ]
    texts = [" Paris, the", " Roman", None, " Paris"]
    table = conform(
        "metrics", rows(probes, scores, round=4, edit_rounds=[2] * len(probes), generated=texts)
    )
    assert table.column("round").to_pylist() == [4] * 4
    assert table.column("edit_round").to_pylist() == [2] * 4
    assert table.column("probe_index").to_pylist() == [0, 3, 1, 0]
    assert table.column("nll_new").to_pylist() == [0.5, 0.5, None, 1.5]
    assert table.column("success").to_pylist() == [True, False, None, None]
    assert table.column("exact").to_pylist() == [False, True, True, False]
    assert table.column("generated_match").to_pylist() == [True, False, None, True]
    plain = conform("metrics", rows(probes, scores, round=4, edit_rounds=[2] * len(probes)))
    assert plain.column("generated").null_count == 4
    assert plain.column("generated_match").null_count == 4


def metric(case_id: str, probe: str, success: bool | None, **others: Any) -> dict[str, Any]:
    row = {"round": 0, "edit_round": 0, "case_id": case_id, "probe": probe, "probe_index": 0}
    return row | {"prompt": "p", "success": success, "exact": success} | others


def test_a_score_is_the_mean_over_edits_of_the_mean_over_their_probes() -> None:
    table = conform(
        "metrics",
        [
            metric("a", "rewrite", True, nll_new=math.log(2), nll_true=math.log(4)),
            metric("b", "rewrite", False, nll_new=math.log(4), nll_true=math.nan),
            *[metric("a", "paraphrase", value) for value in (True, False, False, False)],
            metric("b", "paraphrase", True),
            metric("a", "neighborhood", True),
            metric("b", "neighborhood", True, generated_match=False),
            metric("a", "neighborhood", False, round=-1),
            metric("a", "locality", None, exact=True, nll_true=0.0),
        ],
    )
    before, after = summarise(table)["rounds"]
    assert (before["round"], before["edits"], before["NS"]["score"]) == (-1, 1, 0.0)
    assert before["ES"] is None and before["PS"] is None and before["S"] is None
    assert (after["round"], after["edits"]) == (0, 2)
    assert after["ES"]["score"] == 50.0
    assert after["PS"]["score"] == pytest.approx(100 * (0.25 + 1) / 2)
    assert after["NS"]["score"] == 100.0
    assert after["S"]["score"] == pytest.approx(3 / (1 / 50 + 1 / 62.5 + 1 / 100))
    paraphrase = after["probes"]["paraphrase"]
    assert (paraphrase["edits"], paraphrase["probes"]) == (2, 5)
    assert paraphrase["probability_new"] is None and paraphrase["generated_match"] is None
    rewrite = after["probes"]["rewrite"]
    assert rewrite["probability_new"] == pytest.approx((1 / 2 + 1 / 4) / 2, rel=1e-6)
    assert rewrite["probability_true"] == pytest.approx(1 / 8, rel=1e-6)  # nan counts as 0
    assert after["probes"]["neighborhood"]["generated_match"]["score"] == 0.0
    locality = after["probes"]["locality"]
    assert locality["success"] is None and locality["exact"]["score"] == 100.0
    assert locality["probability_true"] == 1.0


def test_the_interval_of_s_is_a_bootstrap_over_edits_of_all_three_scores() -> None:
    """Against a plain loop over draws of edits, with its own random numbers."""
    generator = np.random.default_rng(0)
    edits = 80
    skill = generator.beta(3, 2, size=edits)
    kinds = {"rewrite": 1, "paraphrase": 2, "neighborhood": 5}
    values = {
        kind: generator.random((edits, count)) < skill[:, None] for kind, count in kinds.items()
    }
    listed = [
        metric(f"{edit:03d}", kind, bool(value))
        for kind, of_kind in values.items()
        for edit in range(edits)
        for value in of_kind[edit]
    ]
    [summary] = summarise(conform("metrics", listed))["rounds"]
    draws = []
    for _ in range(4000):
        chosen = generator.integers(edits, size=edits)
        draws.append(harmonic_mean([of_kind[chosen].mean() for of_kind in values.values()]))
    low, high = np.percentile(draws, [2.5, 97.5])
    assert summary["S"]["score"] == pytest.approx(
        100 * harmonic_mean([of_kind.mean() for of_kind in values.values()])
    )
    assert summary["S"]["low"] == pytest.approx(100 * low, abs=1.5)
    assert summary["S"]["high"] == pytest.approx(100 * high, abs=1.5)
    means = values["paraphrase"].mean(axis=1)
    bounds = (summary["PS"]["low"], summary["PS"]["high"])
    assert bounds == pytest.approx([100 * bound for bound in interval(means)], abs=1e-9)
    [shuffled] = summarise(conform("metrics", listed[::-1]))["rounds"]
    assert shuffled["S"] == summary["S"]


def test_an_empty_table_has_no_rounds() -> None:
    assert summarise(conform("metrics", [])) == {"rounds": []}


def test_ten_thousand_edits_in_two_rounds_take_seconds() -> None:
    edits, rounds = 10_000, (-1, 0)
    kinds = ["rewrite", *["paraphrase"] * 2, *["neighborhood"] * 10]
    size = edits * len(kinds) * len(rounds)
    generator = np.random.default_rng(1)
    success = generator.random(size) < 0.6
    nll = generator.exponential(size=size)
    table = conform(
        "metrics",
        pa.table(
            {
                "round": np.repeat(rounds, edits * len(kinds)),
                "edit_round": np.zeros(size, dtype=np.int32),
                "case_id": np.tile(np.repeat(np.arange(edits).astype(str), len(kinds)), 2),
                "probe": np.tile(kinds, edits * len(rounds)),
                "probe_index": np.zeros(size, dtype=np.int32),
                "prompt": np.full(size, "p"),
                "nll_new": nll,
                "nll_true": nll,
                "success": success,
                "exact": ~success,
            }
        ),
    )
    start = time.process_time()
    summary = summarise(table)
    assert time.process_time() - start < 8.0
    assert [entry["round"] for entry in summary["rounds"]] == [-1, 0]
    for entry in summary["rounds"]:
        assert entry["edits"] == edits
        assert entry["probes"]["neighborhood"]["probes"] == 10 * edits
        for name in ("ES", "PS", "NS", "S"):
            assert entry[name]["low"] < 60.0 < entry[name]["high"]
            assert entry[name]["high"] - entry[name]["low"] < 3.0
    json.dumps(summary, allow_nan=False)
