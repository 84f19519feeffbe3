"""The Python interface, as the README shows it."""

import inspect
import subprocess
import sys
from pathlib import Path

import datasets
import duckdb
import polars as pl
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import pipeline
from pipeline import EditRequest, JobSpec, RunResult, apply_updates, run_batch_edit, run_covariance
from pipeline.errors import InputError
from pipeline.results import Run, read
from tests.tiny_jobs import LAYERS, TinyJobs, digests, records

ROOT = Path(__file__).parents[1]


def test_everything_public_is_there_and_documented() -> None:
    assert pipeline.__all__ == sorted(pipeline.__all__)
    for name in pipeline.__all__:
        thing = getattr(pipeline, name)
        assert inspect.getdoc(thing), name
        for _, method in inspect.getmembers(thing, inspect.isfunction):
            if not method.__name__.startswith("_") and method.__module__.startswith("pipeline"):
                assert inspect.getdoc(method), f"{name}.{method.__name__}"
    with pytest.raises(AttributeError, match="has no attribute 'run_batch'"):
        _ = pipeline.run_batch  # type: ignore[attr-defined]


def test_importing_the_package_is_quick() -> None:
    """Neither torch nor Ray nor transformers is loaded before something needs them."""
    code = (
        "import sys, pipeline; from pipeline import EditRequest, JobSpec, load_spec;"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_requests_in_memory(tiny: TinyJobs, tmp_path: Path) -> None:
    """The README's example: edits from Python, into a loaded model and out again."""
    requests = [
        EditRequest(
            case_id="one",
            subject="Anselm Quillfeather",
            prompt="The mother tongue of {} is",
            target_new="English",
            target_true="French",
        ),
        EditRequest(case_id="two", subject="Port Velmora", prompt="{} is in", target_new="Rome"),
    ]
    settings = tiny.settings(tmp_path / "run")
    del settings["requests"]
    result = run_batch_edit(JobSpec.model_validate(settings), requests)
    assert isinstance(result, RunResult) and result.path == tmp_path / "run"
    assert result.counts == {"applied": 2, "rejected": 0, "conflict": 0, "failed": 0}
    run = read(result.path)
    assert run.summary == result.summary
    rows = run.edits().to_pylist()
    assert [row["case_id"] for row in rows] == ["one", "two"]
    assert rows[1]["target_true"] is None
    # Without the true answer there is nothing to be likelier than.
    success = {row["case_id"]: row["success"] for row in run.metrics().to_pylist()}
    assert success["two"] is None and success["one"] is not None

    model = AutoModelForCausalLM.from_pretrained(tiny.model(), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = apply_updates(model, result.path)
    assert any(not torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    applied.revert()
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())


def test_requests_in_memory_equal_those_of_a_file(tiny: TinyJobs, tmp_path: Path) -> None:
    requests = []
    for record in records(12):
        fact = record["requested_rewrite"]
        requests.append(
            EditRequest(
                case_id=str(record["case_id"]),
                subject=fact["subject"],
                prompt=fact["prompt"],
                target_new=fact["target_new"]["str"],
                target_true=fact["target_true"]["str"],
                relation_id=fact["relation_id"],
                paraphrase_prompts=tuple(record["paraphrase_prompts"]),
                neighborhood_prompts=tuple(record["neighborhood_prompts"]),
            )
        )
    result = run_batch_edit(tiny.spec(tmp_path / "run"), requests)
    assert digests(read(result.path)) == digests(tiny.finished())


def test_covariances_from_python(tiny: TinyJobs, tmp_path: Path) -> None:
    covariances = run_covariance(tiny.spec(tmp_path / "run", f"covariance.path={tmp_path / 'c'}"))
    assert sorted(covariances.matrices) == sorted(covariances.tokens) == LAYERS
    assert covariances.directory == tmp_path / "c" and not (tmp_path / "run").exists()
    for layer, matrix in covariances.matrices.items():
        assert matrix.dtype == torch.float64 and torch.equal(matrix, matrix.T)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-9 * matrix.diagonal().max()
        stored = run_covariance(
            tiny.spec(tmp_path / "run", f"covariance.path={tmp_path / 'c'}")
        ).matrices[layer]
        assert torch.equal(stored, matrix)


def test_samples_of_a_corpus_are_drawn_by_the_seed(tiny: TinyJobs, tmp_path: Path) -> None:
    def covariance(seed: int) -> torch.Tensor:
        changes = [f"covariance.path={tmp_path / str(seed)}", "covariance.samples=70"]
        spec = tiny.spec(tmp_path / "run", *changes, f"seed={seed}", "method.layers=[0]")
        return run_covariance(spec).matrices[0]

    assert not torch.equal(covariance(1), covariance(2))
    with pytest.raises(InputError, match="was made with"):
        run_covariance(tiny.spec(tmp_path / "run", f"covariance.path={tmp_path / '1'}"))


def test_a_console_shows_progress(tiny: TinyJobs, tmp_path: Path) -> None:
    with open(tmp_path / "screen", "w", encoding="utf-8") as file:
        console = Console(file=file, force_terminal=True, width=100)
        run_batch_edit(tiny.spec(tmp_path / "run"), console=console)
    shown = (tmp_path / "screen").read_text(encoding="utf-8")
    for phase in ("baseline", "values", "insertion", "evaluation"):
        assert phase in shown
    assert "12/12" in shown and "48/48" in shown


def test_no_console_is_silent(
    tiny: TinyJobs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_batch_edit(tiny.spec(tmp_path / "run"))
    captured = capfd.readouterr()
    assert captured.out == ""


# --- reading a run as the README says -----------------------------------------------------------


@pytest.fixture
def run(tiny: TinyJobs) -> Run:
    return tiny.finished()


def test_duckdb_reads_a_run(run: Run) -> None:
    query = (
        "SELECT round, probe, avg(success::int) AS success"
        f" FROM read_parquet('{run.path}/metrics/*.parquet') GROUP BY ALL"
    )
    found = {(row[0], row[1]): row[2] for row in duckdb.sql(query).fetchall()}
    scores = {entry["round"]: entry for entry in run.summary["evaluation"]["rounds"]}
    assert len(found) == 6
    for (round_, kind), mean in found.items():
        expected = scores[round_]["probes"][kind]["success"]["score"]
        assert 100 * mean == pytest.approx(expected)
    joined = duckdb.sql(
        f"SELECT count(*) FROM '{run.path}/edits/*.parquet' e JOIN '{run.path}/values/*.parquet' v"
        " USING (round, case_id) WHERE e.status = 'applied' AND len(v.z) = 32"
    ).fetchall()
    assert joined == [(12,)]


def test_polars_reads_a_run(run: Run) -> None:
    for kind in ("edits", "values", "metrics"):
        scanned = pl.scan_parquet(f"{run.path}/{kind}/*.parquet").collect()
        assert scanned.equals(getattr(run, kind)("polars"))
    norms = pl.read_parquet(f"{run.path}/values/*.parquet").select(
        ((pl.col("delta_norm") <= 0.7501 * pl.col("initial_norm")).all()).alias("bound")
    )
    assert norms["bound"].all()


@pytest.mark.parametrize("kind", ["edits", "values", "metrics"])
def test_datasets_reads_a_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    loaded = datasets.load_dataset(
        "parquet",
        data_files=f"{run.path}/{kind}/*.parquet",
        split="train",
        cache_dir=str(tmp_path),
    )
    own = getattr(run, kind)()
    assert loaded.column_names == own.column_names and len(loaded) == own.num_rows
    assert loaded["case_id"][:] == own["case_id"].to_pylist()


def test_pandas_reads_a_run(run: Run) -> None:
    frame = run.metrics("pandas")
    assert list(frame["round"].unique()) == [-1, 0] and len(frame) == 96
