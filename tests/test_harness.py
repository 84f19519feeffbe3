"""`editfleet harness`: lm-evaluation-harness on tasks defined here, no network."""

import io
import math
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import apply_updates, write_report
from pipeline.cli import main
from pipeline.errors import InputError, ResultsDamagedError
from pipeline.harness import run_harness
from pipeline.report.benchmarks import benchmark_table
from pipeline.results import read
from pipeline.results.harness import write_harness
from pipeline.results.schemas import HARNESS
from tests.lm_eval_tasks import QUESTIONS, write_questions, write_task
from tests.tiny_jobs import TinyJobs

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'editfleet[harness]'"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two multiple-choice tasks, one of which cannot be loaded."""
    folder = tmp_path_factory.mktemp("tasks")
    write_questions(folder / "questions.jsonl")
    for name, file in (("facts", "questions.jsonl"), ("lost", "absent.jsonl")):
        write_task(folder, name, file, metadata={"version": 3})
    return folder


@pytest.fixture
def without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where lm-eval is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    yield


def _accuracy(model: Any, tokenizer: Any) -> float:
    """The share of questions whose right option is the likeliest: summed log-likelihoods."""
    right = 0
    for question, options, answer in QUESTIONS:
        sums = []
        for option in options:
            start = len(tokenizer(question)["input_ids"])
            ids = torch.tensor([tokenizer(question + option)["input_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            sums.append(float(logits.gather(1, ids[0, start:, None]).sum()))
        right += sums.index(max(sums)) == answer
    return right / len(QUESTIONS)


@needs_harness
def test_both_models_are_scored_as_a_plain_loop_scores_them(
    tiny: TinyJobs, tasks: Path, tmp_path: Path
) -> None:
    run = tiny.finished()
    [row] = run_harness(run.path, ["facts"], include_path=tasks, output=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny.model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model())
    assert row["unedited"] == pytest.approx(_accuracy(model, tokenizer))
    apply_updates(model, run.path)
    assert row["edited"] == pytest.approx(_accuracy(model, tokenizer))
    assert row["edited"] > row["unedited"]
    # Of a mean over n: the sample's standard deviation over the root of n.
    p, n = row["edited"], len(QUESTIONS)
    assert row["edited_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    assert (row["round"], row["task"], row["metric"], row["filter"]) == (0, "facts", "acc", "none")
    assert (row["count"], row["documents"], row["version"]) == (n, n, "3")
    assert row["higher_is_better"] is True and row["num_fewshot"] == 0
    [file] = tmp_path.iterdir()
    assert file.name == "round-00000-facts.parquet"
    assert pq.read_schema(file).equals(HARNESS) and pq.read_table(file).to_pylist() == [row]
    assert not (run.path / "harness").exists()


@needs_harness
def test_the_command_keeps_the_tables_and_the_report_shows_them(
    tiny: TinyJobs,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    run = Path(shutil.copytree(tiny.finished().path, tmp_path / "run"))
    command = ["harness", str(run), "--tasks", "facts", "--include-path", str(tasks)]
    for limit in ("3", "5"):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--limit", limit, "--round", "0"])
        assert not ended.value.code
    printed = capsys.readouterr().out
    [row] = read(run).harness().to_pylist()
    assert row["count"] == 5 and "5 of 12" in printed and f"{row['edited']:.4f}" in printed
    assert read(run).harness("polars").to_dicts() == [row]
    page = write_report([run], tmp_path / "page").read_text()
    assert "lm-evaluation-harness" in page and f"{row['unedited']:.4f} ±" in page
    read(run).verify()


@needs_harness
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("facts,nothing", "no task 'nothing' or"),
        ("lost", r"task 'lost' cannot be loaded: .*absent\.jsonl"),
        (" , ", "no task to evaluate"),
    ],
)
def test_a_task_that_is_not_there_ends_in_one_line(
    tiny: TinyJobs, tasks: Path, monkeypatch: pytest.MonkeyPatch, names: str, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # Reading the harness's own thousands of tasks takes half a minute.
    from lm_eval import tasks as managers

    class OwnOnly(managers.TaskManager):
        def __init__(self, **choices: Any) -> None:
            super().__init__(**{**choices, "include_defaults": False})

    monkeypatch.setattr(managers, "TaskManager", OwnOnly)
    run = tiny.finished().path
    with pytest.raises(SystemExit) as ended:
        main(["harness", str(run), "--tasks", names, "--include-path", str(tasks)])
    [line] = [one for one in capsys.readouterr().err.splitlines() if "editfleet: " in one]
    assert ended.value.code == 2 and re.search(message, line)
    assert not (run / "harness").exists()


def test_without_the_extra_one_line_says_how_to_get_it(
    tiny: TinyJobs, without_lm_eval: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["harness", str(tiny.finished().path), "--tasks", "facts"])
    [line] = [one for one in capsys.readouterr().err.splitlines() if "editfleet: " in one]
    assert ended.value.code == 2 and "pip install 'editfleet[harness]'" in line


def test_a_round_or_a_folder_that_is_not_there_is_refused(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no round 1; its last whole one is 0"):
        run_harness(tiny.finished().path, ["facts"], round=1)
    with pytest.raises(InputError, match="not a run directory"):
        run_harness(tmp_path, ["facts"])


ROW = {
    "round": 0,
    "task": "[b]facts",
    "metric": "exact_match",
    "filter": "strict",
    "unedited": None,
    "edited": 0.25,
    "edited_stderr": 0.125,
    "higher_is_better": False,
    "count": 5,
    "documents": 12,
    "num_fewshot": 2,
    "version": "3",
    "lm_eval_version": "0.4.13",
}


def test_tables_are_read_back_shown_and_damaged_ones_named(tiny: TinyJobs, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny.finished().path, tmp_path / "run"))
    assert read(run).harness().num_rows == 0
    write_harness(run / "harness", 0, "a", [ROW])
    file = write_harness(run / "harness", 0, "b", [ROW | {"unedited": 0.5, "filter": "none"}])
    table = read(run).harness()
    assert table.schema.equals(HARNESS) and table["unedited"].to_pylist() == [None, 0.5]
    console = Console(file=io.StringIO(), width=120)
    console.print(benchmark_table(table.to_pylist()))
    assert isinstance(console.file, io.StringIO)
    first, second = [line for line in console.file.getvalue().splitlines() if "[b]facts" in line]
    assert "exact_match (strict)" in first and "0.2500 ± 0.1250" in first and "5 of 12" in first
    assert "-0.2500" in second and "lower" in second and "strict" not in second
    assert "-0.2500" in write_report([run], tmp_path / "page").read_text()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ResultsDamagedError, match="round-00000-b"):
        read(run).harness()
    file.unlink()
    file.symlink_to(tmp_path / "page" / "report.html")
    with pytest.raises(ResultsDamagedError, match="leads out of the run"):
        write_report([run], tmp_path / "page")
