"""The summary as a person sees it."""

from typing import Any

from rich.console import Console

from pipeline.report.summary import problem_lines, summary_tables
from tests.tiny_jobs import TinyJobs


def _shown(summary: dict[str, Any]) -> str:
    console = Console(width=80, record=True, force_terminal=False)
    console.print(summary_tables(summary))
    return console.export_text()


def test_a_run_fits_eighty_columns(tiny: TinyJobs) -> None:
    summary = tiny.finished().summary
    text = _shown(summary)
    assert max(len(line) for line in text.splitlines()) <= 80
    after = summary["evaluation"]["rounds"][1]["NS"]
    assert f"{after['score']:.1f} [{after['low']:.1f}, {after['high']:.1f}]" in text
    assert "12 applied, 0 rejected, 0 conflict, 0 failed" in text
    for name in ("rewrite (ES)", "paraphrase (PS)", "neighbourhood (NS)", "harmonic mean (S)"):
        assert name in text
    assert "values" in text.split("time:")[1]


def test_without_an_evaluation_there_is_no_table(tiny: TinyJobs) -> None:
    text = _shown(tiny.finished("evaluation.probes=[]").summary)
    assert "ES" not in text and "12 applied" in text


def test_problems_are_lines_and_not_too_many() -> None:
    rows = [{"case_id": str(i), "status": "rejected", "reason": f"row {i}\nbad"} for i in range(30)]
    rows.append({"case_id": "fine", "status": "applied", "reason": ""})
    lines = problem_lines(rows)
    assert lines[0] == "rejected: 0: row 0 bad"
    assert len(lines) == 21 and "10 more" in lines[-1]
