"""The job of causal tracing, whole, in this process."""

import json
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest

from pipeline import run_batch_edit
from pipeline.cluster.tracing import run_trace
from pipeline.errors import InputError
from pipeline.report.status import run_status
from pipeline.results import Run, read
from tests.tiny_jobs import TinyJobs, records

TRACE = ("trace.samples=2", "trace.window=2", "trace.known_only=false")


@pytest.fixture(scope="module")
def traced(tiny: TinyJobs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five facts in two shards; only read it."""
    path = tmp_path_factory.mktemp("traces") / "run"
    run_trace(tiny.spec(path, *TRACE, requests=records(5)))
    return read(path)


def test_a_row_a_fact_kind_token_and_layer(traced: Run) -> None:
    table = traced.trace()
    assert len(traced.files("trace")) == 2
    keys = table.group_by(["case_id", "kind", "token", "layer"]).aggregate([([], "count_all")])
    assert keys.num_rows == table.num_rows
    assert set(table["round"].to_pylist()) == {-1}
    for row in table.slice(0, 40).to_pylist():
        assert row["effect"] == pytest.approx(row["restored"] - row["corrupted"], abs=1e-6)
        assert row["window"] == (2 if row["kind"] in ("mlp", "attention") else 1)
    last = table.filter(
        pc.and_(pc.equal(table["token_class"], "last"), pc.equal(table["layer"], 3))
    )
    state = last.filter(pc.equal(last["kind"], "state"))
    assert state["restored"].to_pylist() == state["clean"].to_pylist()
    summary = traced.summary
    assert summary["requests"]["traced"] == summary["trace"]["facts"] == 5
    assert summary["trace"]["proposal"]["reason"]
    status = run_status(traced.path)
    assert status.state == "finished" and [phase.left for phase in status.phases] == [0]


def test_an_interrupted_trace_goes_on_to_the_same_bits(
    traced: Run, tiny: TinyJobs, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    shutil.copytree(traced.path, path)
    second = path / "trace" / "baseline-shard-00001.parquet"
    whole, (first, _) = second.read_bytes(), traced.files("trace")
    second.write_bytes(whole[:-1])
    spec = tiny.spec(path, *TRACE, requests=records(5))
    before = (path / "trace" / first.name).stat().st_mtime_ns
    run_trace(spec)
    assert second.read_bytes() == whole
    assert (path / "trace" / first.name).stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"trace\.samples was 2 and is 3"):
        run_trace(tiny.spec(path, *TRACE, "trace.samples=3", requests=records(5)))


def test_two_workers_give_the_bits_of_one_process(
    traced: Run, tiny: TinyJobs, tmp_path: Path, local_ray: None
) -> None:
    cluster = "cluster={engine: ray, workers: 2, shard_size: 3, reducer_threads: 1}"
    run = read(run_trace(tiny.spec(tmp_path / "ray", *TRACE, cluster, requests=records(5))).path)
    assert run.trace().num_rows > 0 and run.trace().equals(traced.trace())
    assert [path.name for path in run.files("trace")] == [p.name for p in traced.files("trace")]
    assert run.summary["trace"] == traced.summary["trace"]


def test_facts_that_the_model_does_not_know_are_skipped(tiny: TinyJobs, tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path / "run", "trace.samples=2", requests=records(3))
    result = run_trace(spec)
    assert result.counts["skipped"] == 3 and result.counts["failed"] == 0
    (part, *_) = [
        json.loads(line) for line in (result.path / "manifest.jsonl").read_text().splitlines()
    ]
    assert all("skipped: the model answers" in reason for reason in part["failed"].values())


def test_a_trace_is_not_an_edit(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="editfleet trace"):
        run_batch_edit(tiny.spec(tmp_path / "run", *TRACE))
    with pytest.raises(InputError, match="rounds"):
        run_trace(tiny.spec(tmp_path / "run", "rounds.size=2"))
    with pytest.raises(InputError, match="severed states are compared with states"):
        tiny.spec(tmp_path / "run", "trace.kinds=[severed_mlp]")
