"""Batches that ruin the model are found and stopped; edits that did not take are said."""

import logging
import math
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from pipeline import apply_updates, run_batch_edit
from pipeline.cluster.divergence import find_ruin, not_taken
from pipeline.cluster.worker import EditWorker
from pipeline.editing.update import Update, output_change
from pipeline.errors import DivergedError, InputError
from pipeline.models.loading import load_model
from pipeline.results import Run, read
from pipeline.results.schemas import conform
from pipeline.sources import read_requests
from tests.cases import draw
from tests.tiny_jobs import LAYERS, TinyJobs, digests, records, statuses

# Values far outside of what the model knows, and nothing to hold the old keys.
WILD = [
    "method.covariance_weight=1.0e-9",
    "method.value={steps: 20, learning_rate: 20, weight_decay: 0, kl_weight: 0, clamp_norm: 100}",
]


def _metrics(*rows: tuple[int, str, float, float | None]) -> pa.Table:
    """(round, case_id, nll_new, nll_true) of rewrite probes."""
    return conform(
        "metrics",
        [
            {
                "round": round,
                "edit_round": 0,
                "case_id": case_id,
                "probe": "rewrite",
                "probe_index": 0,
                "prompt": "x",
                "nll_new": new,
                "nll_true": true,
                "success": None if true is None else new < true,
            }
            for round, case_id, new, true in rows
        ],
    )


# --- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3])
def test_the_change_of_an_ordinary_output_is_estimated(rank: int | None) -> None:
    """Against the root mean square over keys whose mean of k k^T is the covariance."""
    keys = draw(500, 20, seed=1) * torch.linspace(0.1, 3, 20).double()
    covariance = keys.T @ keys / len(keys)
    left, right = draw(30, rank or 30, seed=2), draw(rank or 30, 20, seed=3)
    update = Update.of(left @ right) if rank is None else Update.of(left, right)
    assert set(update.parts) == ({"dense"} if rank is None else {"left", "right"})
    exact = float((keys @ (left @ right).T).square().sum(dim=1).mean().sqrt())
    assert abs(output_change(update, covariance) - exact) < 0.25 * exact
    assert output_change(update, covariance) == output_change(update, covariance)
    assert output_change(Update.of(torch.zeros(30, 20)), covariance) == 0.0


def test_edits_that_did_not_take_are_those_whose_new_object_is_less_likely() -> None:
    metrics = _metrics(
        (-1, "a", 9.0, 1.0),
        (0, "a", 0.5, 2.0),
        (0, "b", 3.25, 1.5),
        (0, "c", 1.0, None),
        (0, "d", math.nan, 1.0),
    )
    found = not_taken(metrics, 0)
    assert set(found) == {"b", "d"}
    assert found["b"] == "did not take: target_new has 3.250 nats a token, target_true 1.500"
    assert not_taken(metrics.slice(0, 0), 0) == {}


def test_ruin_is_told_from_both_rounds() -> None:
    before = [(-1, str(n), 5.0, 1.0) for n in range(10)]
    worse = [(0, str(n), 6.0, 1.0) for n in range(10)]
    better = [(0, str(n), 1.0, 1.0) for n in range(10)]
    assert find_ruin(_metrics(*before, *better), -1, 0) is None
    assert find_ruin(_metrics(*before, *worse[:8], *better[8:]), -1, 0) is None
    said = find_ruin(_metrics(*before, *worse[:9], *better[9:]), -1, 0)
    assert said == "the edits made 9 of 10 new objects less likely than they were"
    broken = [(0, "0", math.nan, 1.0), *better[1:]]
    said = find_ruin(_metrics(*before, *broken), -1, 0)
    assert said == "the edited model has no finite likelihood for 1 of 10 rewrites"
    broken_before = [(-1, "0", math.nan, 1.0), *before[1:]]
    assert find_ruin(_metrics(*broken_before, *broken), -1, 0) is None
    assert find_ruin(_metrics(*worse), -1, 0) is None, "without a baseline nothing is compared"
    assert find_ruin(_metrics(), -1, 0) is None


# --- whole jobs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wild(tiny: TinyJobs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A job that is stopped, and what it says."""
    path = tmp_path_factory.mktemp("wild") / "run"
    with pytest.raises(DivergedError) as caught:
        run_batch_edit(tiny.spec(path, *WILD, "output.save_model=true"))
    return read(path), str(caught.value)


def test_a_wild_update_reaches_no_file_and_every_edit_says_why(wild: tuple[Run, str]) -> None:
    run, said = wild
    assert "layer 0: the update moves ordinary tokens by" in said and "method.max_drift 2" in said
    assert "output.on_divergence: keep" in said and "\n" not in said
    assert not run.updates() and not (run.path / "model").exists()
    assert run.manifest["status"] == "failed"
    assert statuses(run) == {"failed": 12}
    assert all(said in row["reason"] for row in run.edits().to_pylist())
    run.verify()


def test_the_updates_of_a_diverged_run_are_not_applied(
    wild: tuple[Run, str], tiny: TinyJobs
) -> None:
    spec = tiny.spec(Path("unused")).model
    with pytest.raises(InputError, match="is not finished"):
        apply_updates(load_model(spec, torch.device("cpu")), wild[0].path)


def test_a_wild_update_is_kept_when_told_so(
    tiny: TinyJobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = [*WILD, "output.on_divergence=keep", "output.save_model=true"]
    with caplog.at_level(logging.WARNING):
        run = read(run_batch_edit(tiny.spec(tmp_path / "run", *changes)).path)
    assert "going on, as output.on_divergence says" in caplog.text
    assert len(run.updates()) == 2 and (run.path / "model" / "config.json").is_file()
    assert statuses(run) == {"applied": 12}


def test_a_stopped_batch_goes_on_when_told_so(tiny: TinyJobs, tmp_path: Path) -> None:
    """Values and baseline are kept, and the bits are those of a run that was never stopped."""
    with pytest.raises(DivergedError):
        run_batch_edit(tiny.spec(tmp_path / "run", *WILD))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "values").iterdir()}
    spec = tiny.spec(tmp_path / "run", *WILD, "output.on_divergence=keep")
    run = read(run_batch_edit(spec).path)
    assert kept == {path: path.stat().st_mtime_ns for path in (run.path / "values").iterdir()}
    assert digests(run) == digests(tiny.finished(*WILD, "output.on_divergence=keep"))
    assert run.manifest["status"] == "finished" and statuses(run) == {"applied": 12}


def test_a_higher_limit_lets_it_pass_to_the_same_bits(tiny: TinyJobs) -> None:
    kept = tiny.finished(*WILD, "output.on_divergence=keep")
    raised = tiny.finished(*WILD, "method.max_drift=1.0e+9", "output.on_divergence=keep")
    assert digests(kept) == digests(raised)


def test_a_model_ruined_in_the_end_is_not_saved(tiny: TinyJobs, tmp_path: Path) -> None:
    """Wild values that pass the limit of drift and make every new object less likely."""
    search = "{steps: 20, learning_rate: 20, weight_decay: 0, kl_weight: 100, clamp_norm: 100}"
    changes = ["method.covariance_weight=1.0e-9", f"method.value={search}", "method.max_drift=1e9"]
    changes += [f"covariance.path={tiny.root / 'covariances' / 'llama'}", "output.save_model=true"]
    path = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"the edits made 3 of 3 new objects less likely"):
        run_batch_edit(tiny.spec(path, *changes, family="llama", requests=records(3)))
    run = read(path)
    assert not (path / "model").exists() and run.manifest["status"] == "failed"
    assert run.metrics().num_rows == 2 * 3 * 4 and statuses(run) == {"applied": 3}
    assert run.summary["not_taken"] == sum(row["reason"] != "" for row in run.edits().to_pylist())


def test_a_summary_counts_what_did_not_take(tiny: TinyJobs) -> None:
    run = tiny.finished()
    after = run.metrics("polars").filter(round=0, probe="rewrite")
    missed = set(after.filter(success=False)["case_id"])
    said = {row["case_id"] for row in run.edits().to_pylist() if row["reason"]}
    assert said == missed and run.summary["not_taken"] == len(missed) > 0
    without = tiny.finished("evaluation.probes=[]")
    assert without.summary["not_taken"] == 0


def test_keys_that_are_not_finite_are_named(tiny: TinyJobs, tmp_path: Path) -> None:
    """As they are after an update has ruined an earlier layer."""
    worker = EditWorker(tiny.spec(tmp_path / "run"), 1)
    rows = read_requests(tiny.requests(records(3)))
    requests = [row.request for row in rows if row.request is not None]
    values = torch.zeros(3, 32)
    values[1, 4] = float("inf")
    with pytest.raises(DivergedError, match=r"layer 0: .* 1 requests .*'1'") as caught:
        worker.read_keys(0, requests, values, LAYERS[0], version=0)
    assert caught.value.case_ids == ("1",)
