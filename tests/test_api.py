"""What the README shows of the Python side, on a real run."""

import subprocess
import sys
from pathlib import Path

import duckdb
import polars
import pytest
from datasets import load_dataset

import pipeline
from pipeline import EditRequest, run_batch_edit
from pipeline.errors import InputError
from pipeline.results import read
from tests.tiny_jobs import TinyJobs, statuses


def _request(case_id: str, target: str) -> EditRequest:
    return EditRequest(
        case_id=case_id,
        subject="Anselm Quillfeather",
        prompt="The mother tongue of {} is",
        target_new=target,
        target_true="Spanish",
    )


def test_requests_can_be_given_in_memory(tiny: TinyJobs, tmp_path: Path) -> None:
    other = _request("two", "the violin").model_copy(update={"prompt": "{} plays"})
    result = run_batch_edit(tiny.spec(tmp_path / "run"), [_request("one", "English"), other])
    assert result.counts == {"applied": 2, "rejected": 0, "conflict": 0, "failed": 0}
    assert read(result.path).edits()["case_id"].to_pylist() == ["one", "two"]


@pytest.mark.parametrize(
    ("policy", "applied", "conflicting"), [("refuse", [], 2), ("first", ["one"], 1)]
)
def test_conflicts_follow_the_policy(
    tiny: TinyJobs, tmp_path: Path, policy: str, applied: list[str], conflicting: int
) -> None:
    requests = [_request("one", "English"), _request("two", "Latin")]
    third = _request("three", "Rome").model_copy(update={"subject": "Port Velmora"})
    spec = tiny.spec(tmp_path / "run", f"requests.on_conflict={policy}")
    run = read(run_batch_edit(spec, [*requests, third]).path)
    assert statuses(run) == {"applied": len(applied) + 1, "conflict": conflicting}


def test_conflicts_can_stop_the_job(tiny: TinyJobs, tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path / "run", "requests.on_conflict=error")
    with pytest.raises(InputError, match="Anselm"):
        run_batch_edit(spec, [_request("one", "English"), _request("two", "Latin")])
    assert not (tmp_path / "run").exists()


def test_other_tools_read_a_run(tiny: TinyJobs) -> None:
    run = tiny.finished()
    for kind in ("edits", "values", "metrics"):
        rows = getattr(run, kind)().num_rows
        pattern = str(run.path / kind / "*.parquet")
        assert rows > 0
        assert duckdb.sql(f"FROM read_parquet('{pattern}')").df().shape[0] == rows
        assert polars.read_parquet(pattern).height == rows
        assert load_dataset("parquet", data_files=pattern, split="train").num_rows == rows
    query = f"""SELECT round, probe, avg(success::int)
                FROM read_parquet('{run.path}/metrics/*.parquet') GROUP BY ALL"""
    assert len(duckdb.sql(query).fetchall()) == 6


def test_the_package_names_what_it_offers() -> None:
    for name in pipeline.__all__:
        assert getattr(pipeline, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        pipeline.nothing  # noqa: B018


def test_a_spec_is_checked_without_torch_or_ray() -> None:
    code = (
        "import sys, pipeline; pipeline.JobSpec(); pipeline.EditRequest;"
        "assert not {'torch', 'ray'} & set(sys.modules), 'heavy import'"
    )
    root = str(Path(__file__).parents[1])
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_core_and_a_whole_job_run_without_ray(tiny: TinyJobs, tmp_path: Path) -> None:
    spec = tiny.spec_file(tmp_path / "spec.yaml", tiny.settings(tmp_path / "run"))
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from pipeline.cli import main\n"
        f"main(['edit', {str(spec)!r}])"
    )
    root = str(Path(__file__).parents[1])
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert statuses(read(tmp_path / "run")) == {"applied": 12}
