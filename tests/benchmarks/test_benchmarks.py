"""Every benchmark runs on something tiny, and its fast and plain ways give the same numbers."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks import (
    attribution,
    covariance,
    evaluation,
    gpu,
    keys,
    reading,
    reduce,
    scaling,
    scaling_shapes,
    scheduler,
    small_rounds,
    t_patcher,
    tracing,
    values,
)
from benchmarks.machine import ROOT, append_row, print_goals
from benchmarks.scaling_model import Costs, LayerCosts, efficiency, largest_loss
from benchmarks.timing import alternate
from pipeline.planning.rates import makespan
from tests.tiny_jobs import TinyJobs


@pytest.fixture
def common(tmp_path: Path) -> list[str]:
    """Arguments that all benchmarks take; threads as they are, since they outlast the run."""
    threads = torch.get_num_threads()
    return ["--threads", str(threads), "--results", str(tmp_path)]


@pytest.fixture
def model(common: list[str], tiny: TinyJobs, tmp_path: Path) -> list[str]:
    """Arguments of the benchmarks on a real model: a tiny one."""
    settings = tiny.settings(tmp_path / "run")
    return [
        *("--spec", str(tiny.spec_file(tmp_path / "spec.yaml", settings))),
        *("--model", settings["model"]["path"], "--requests", settings["requests"]["path"]),
        *(*common, "--repeats", "1"),
    ]


def test_values(model: list[str], tmp_path: Path) -> None:
    row = values.main([*model, "--edits", "6", "--plain-edits", "2"])
    assert row["edits"] == 6
    assert row["plain_difference"] < 1e-4
    assert row["plain_ratio"] > 0
    assert 0 <= row["padding_share"] < 1
    stored = pq.read_table(tmp_path / "values.parquet").to_pylist()
    assert len(stored) == 1
    assert stored[0]["plain_ratio"] == row["plain_ratio"]
    assert {"processor", "torch", "transformers", "commit", "threads"} <= set(stored[0])


def test_t_patcher(model: list[str], tiny: TinyJobs) -> None:
    sizes = ("--edits", "3", "--alone", "2", "--queries", "100", "--steps", "30")
    row = t_patcher.main([*model, "--corpus", str(tiny.corpus), *sizes])
    assert row["queries"] == 110 and row["edits"] == 3
    assert row["seconds_alone"] > 0 < row["patches_an_edit"] and row["steps"] == 30


def test_keys(model: list[str]) -> None:
    row = keys.main([*model, "--edits", "4"])
    assert row["largest_difference"] < 1e-5
    assert row["hidden_bytes_an_edit"] > 0


def test_covariance(model: list[str], tiny: TinyJobs) -> None:
    row = covariance.main([*model, "--corpus", str(tiny.corpus), "--texts", "20"])
    assert row["largest_difference"] < 1e-5
    assert row["texts"] == 20
    assert 0 <= row["padding_share"] < 1


def test_evaluation(model: list[str]) -> None:
    row = evaluation.main([*model, "--edits", "3", "--plain-probes", "4"])
    assert row["largest_difference"] < 1e-4
    assert row["same_texts"] == 1.0


def test_attribution(model: list[str]) -> None:
    row = attribution.main([*model, "--edits", "1", "--steps", "2"])
    assert row["largest_relative_difference"] < 1e-4
    assert row["ratio"] > 0 and row["gigaflops"] > 0


def test_tracing(model: list[str]) -> None:
    row = tracing.main([*model, "--edits", "1", "--plain-facts", "1", "--samples", "2"])
    assert row["largest_difference"] < 1e-5
    assert row["ratio"] > 0 and row["states_ratio"] > 0


def test_tracing_by_the_jobs_workers(model: list[str]) -> None:
    """The job's row beside the others, made from the same facts."""
    few = ["--edits", "2", "--plain-facts", "1", "--samples", "2", "--kinds", "state"]
    row = tracing.main([*model, *few, "--workers", "1"])
    assert row["workers"] == 1
    assert 0 < row["job_milliseconds_a_fact"] < 60e3
    plain = row["ratio"] * row["milliseconds_a_fact"]
    assert row["job_ratio"] * row["job_milliseconds_a_fact"] == pytest.approx(plain)


def test_reading(model: list[str]) -> None:
    row = reading.main([*model, "--edits", "5", "--plain-edits", "2"])
    assert row["edits"] == row["accepted"] == 5
    assert row["same_tokens"]
    assert row["plan_seconds"] > 0 and row["tokenise_seconds"] > 0


def test_scaling(model: list[str], tiny: TinyJobs) -> None:
    row = scaling.main([*model, "--corpus", str(tiny.corpus), "--edits", "8", "--shard-size", "2"])
    assert row["shards"] == 4
    assert row["key_megabytes"] > 0 and row["update_megabytes"] > 0
    assert row["values_efficiency_1"] == 1.0
    for phase in ("values", "insertion"):
        # With a model so small the driver, of which there is one, may be what takes the time.
        shares = [row[f"{phase}_efficiency_{workers}"] for workers in (1, 2, 8, 64, 512)]
        assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < 1
    # So few probes are one shard.
    assert row["evaluation_seconds_64"] == pytest.approx(row["evaluation_seconds_1"])


def test_scaling_of_shapes(tmp_path: Path) -> None:
    """Counted and measured costs go into one model; the reason is what most is lost to."""
    arguments = ["--shapes", "tiny", "--edits", "500", "40000", "--results", str(tmp_path)]
    few, many = scaling_shapes.main([*arguments, "--teraflops", "0.001"])
    for row in (few, many):
        assert row["values_efficiency_1"] == row["all_efficiency_1"] == 1.0
        assert row["all_seconds_8"] < row["all_seconds_1"]
    # 32 shards of 16: 64 workers and more have none for each.
    assert few["values_seconds_32"] == pytest.approx(few["values_seconds_512"])
    assert few["values_below_goal"] == 64 and "without a shard" in few["values_because"]
    assert few["insertion_below_goal"] <= many["insertion_below_goal"]
    stored = pq.read_table(tmp_path / "scaling_shapes.parquet")
    assert stored["edits"].to_pylist() == [500, 40000]


def test_the_model_of_scaling_adds_up_what_waits_for_what() -> None:
    """By hand: five shards on two workers, a slow driver, one layer over a link of 10 bytes/s."""
    layer = LayerCosts(keys=[1.0, 1.0], merge=2.0, apply=0.5, inward=20, update=5, sums=[4.0])
    pieces = {"values": [3.0, 1.0, 1.0, 1.0, 2.0], "evaluation": [0.1] * 4}
    costs = Costs(pieces, [layer], {"evaluation": 0.2})
    assert costs.phases == ("values", "insertion", "evaluation")
    assert costs.parts("values", 1, 10.0) == {"even": 8.0}
    assert costs.parts("values", 2, 10.0) == {"even": 4.0, "uneven": 1.0}
    alone, two = (costs.parts("insertion", workers, 10.0) for workers in (1, 2))
    assert alone == {"even": 6.0, "merge": 2.0, "apply": 0.5}
    assert two == {"even": 3.0, "groups": 2.0, "merge": 2.0, "apply": 0.5, "network": 2.5}
    assert efficiency(alone, two, 2) == 8.5 / 20
    assert "on their way" in largest_loss(two) and largest_loss(Counter({"even": 1.0})) == "nothing"
    # The driver needs 0.8 s for four shards that two workers have done in 0.2 s.
    assert costs.parts("evaluation", 2, 10.0).total() == pytest.approx(0.8)
    assert costs.all_parts(2, 10.0).total() == pytest.approx(5.0 + 10.0 + 0.8)


def test_scheduler(tmp_path: Path) -> None:
    """Three shards for two workers, and a plan that is held."""
    arguments = ["--workers", "2", "--edits", "40", "--requests", "50", "--results", str(tmp_path)]
    row = scheduler.main(arguments)
    assert row["shards"] == 3 and row["requests"] == 50
    assert row["values_milliseconds"] > 0 and row["read_keys_again_milliseconds"] > 0


def test_small_rounds(tmp_path: Path) -> None:
    """Two workers, two studies of one piece a phase: side by side, or one behind the other."""
    sizes = ["--workers", "2", "--studies", "2", "--rounds", "5", "--repeats", "3"]
    row = small_rounds.main([*sizes, "--milliseconds", "20", "--results", str(tmp_path)])
    assert 1.3 < row["times_faster"] < 2.5


def test_workers_take_the_next_piece_when_they_are_free() -> None:
    pieces = [3.0, 1.0, 1.0, 1.0, 2.0]
    assert [makespan(pieces, workers) for workers in (1, 2, 5)] == [8.0, 5.0, 3.0]


def test_reduce(common: list[str]) -> None:
    sizes = ["--edits", "6", "--key-size", "64", "--hidden-size", "8", "--repeats", "1"]
    row = reduce.main([*common, *sizes])
    assert row["largest_difference"] < 1e-10
    assert (row["bytes_keys"], row["bytes_gram"]) == (4 * 6 * 72, 8 * 64 * 72)


def test_gpu_on_a_tiny_shape(common: list[str]) -> None:
    sizes = ["--shape", "tiny", "--edits", "8", "--batch", "4", "--tokens", "300"]
    row = gpu.main([*common, *sizes, "--dtype", "float32"])
    for phase in ("values", "keys", "covariance", "factor", "reduce"):
        assert row[f"{phase}_seconds"] > 0
        assert row[f"{phase}_share"] > 0


def test_gpu_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    absent = ["pydantic", "ray", "datasets", "pyarrow", "rich", "pandas", "psutil"]
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"  # None: importing it fails
        "from benchmarks import gpu\n"
        "gpu.main(['--shape', 'tiny', '--edits', '2', '--tokens', '100', '--dtype', 'float32',"
        f" '--threads', '1', '--results', {str(tmp_path)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'values_seconds'" in done.stdout, "the row is printed where it cannot be written"
    assert not list(tmp_path.iterdir())


def test_alternating_runs_warm_up_and_take_turns() -> None:
    order: list[str] = []
    timed = alternate({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert set(timed) == {"a", "b"}


def test_rows_of_other_columns_are_appended(tmp_path: Path) -> None:
    append_row("some", {"a": 1}, tmp_path)
    append_row("some", {"a": 2, "b": "x"}, tmp_path)
    rows = pq.read_table(tmp_path / "some.parquet").to_pylist()
    assert rows == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_goals_say_which_are_met(capsys: pytest.CaptureFixture[str]) -> None:
    print_goals({"fast": (9.0, ">=", 8.0), "lean": (2.0, "<=", 1.5)})
    fast, lean = [line for line in capsys.readouterr().out.splitlines() if "= " in line]
    assert "yes" in fast
    assert "NO" in lean
