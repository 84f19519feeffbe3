"""The summary tables: the figures of summary.json, as a person reads them."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.evaluation.metrics import SCORES
from pipeline.report.summary import problem_lines, summary_tables
from pipeline.results import read
from tests.tiny_jobs import TinyJobs, records


def _printed(summary: dict[str, Any], width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(summary_tables(summary))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _cell(score: dict[str, float]) -> str:
    return f"{score['score']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"


def test_every_score_of_a_run_is_shown(tiny: TinyJobs) -> None:
    summary = tiny.finished().summary
    text = _printed(summary)
    rounds = summary["evaluation"]["rounds"]
    assert [entry["round"] for entry in rounds] == [-1, 0]
    for name, kind in SCORES.items():
        lines = [line for line in text.splitlines() if f"({name})" in line]
        assert len(lines) == 1 and "unedited" in lines[0]
        edited = text.splitlines()[text.splitlines().index(lines[0]) + 1]
        assert "edited" in edited and "unedited" not in edited
        for line, entry in zip((lines[0], edited), rounds, strict=True):
            assert _cell(entry[name]) in line
            assert _cell(entry["probes"][kind]["exact"]) in line
    assert all(_cell(entry["S"]) in text for entry in rounds)
    assert "requests: 12 applied, 0 rejected, 0 conflict, 0 failed" in text
    for phase, seconds in summary["seconds"].items():
        assert f"{phase} {seconds:.1f} s" in text
    assert text.startswith("tiny: per cent [95 % interval]")


def test_intervals_hold_their_score(tiny: TinyJobs) -> None:
    for entry in tiny.finished().summary["evaluation"]["rounds"]:
        scores = [entry[name] for name in (*SCORES, "S")]
        scores += [probe["exact"] for probe in entry["probes"].values()]
        for score in scores:
            assert 0.0 <= score["low"] <= score["score"] <= score["high"] <= 100.0


def test_a_run_without_evaluation_shows_the_rest(tiny: TinyJobs) -> None:
    text = _printed(tiny.finished("evaluation.probes=[]").summary)
    assert "12 applied" in text and "values" in text and "per cent" not in text


def test_scores_that_are_not_defined_are_left_empty(tiny: TinyJobs) -> None:
    changes = ["evaluation.baseline=false", "evaluation.probes=[rewrite]"]
    text = _printed(tiny.finished(*changes).summary)
    (paraphrase,) = (line for line in text.splitlines() if "(PS)" in line)
    assert "[" not in paraphrase and "None" not in text and "nan" not in text
    assert "unedited" not in text


def test_a_narrow_terminal_loses_nothing(tiny: TinyJobs) -> None:
    text = _printed(tiny.finished().summary, width=60)
    assert text.count("[") >= 14 and "applied" in text


def test_problems_are_one_line_each_and_counted() -> None:
    rows = [
        {
            "case_id": str(number),
            "status": "applied" if number % 2 else "rejected",
            "reason": "a\nb",
        }
        for number in range(60)
    ]
    lines = problem_lines(rows)
    assert len(lines) == 21 and lines[0] == "rejected: 0: a b"
    assert all("\n" not in line for line in lines)
    assert "10 more" in lines[-1] and "edits/" in lines[-1]
    assert problem_lines([row for row in rows if row["status"] == "applied"]) == []


def test_what_the_rest_of_the_model_lost_and_what_was_asked_beside(tiny: TinyJobs) -> None:
    content = records(3)
    for record in content:
        who = record["requested_rewrite"]["subject"]
        record["locality"] = [{"prompt": "It is in", "target": "Rome"}]
        probe = {"prompt": f"{who}'s", "target": "Rome", "target_true": "Paris"}
        record["portability"] = [probe | {"aspect": "one_hop"}]
        record["generation_prompts"] = [f"{who} is"]
    summary = tiny.finished(
        "evaluation.probes=[rewrite, locality, portability, generation]",
        "evaluation.generate=true",
        "evaluation.fluency_tokens=8",
        f"evaluation.general.corpus={tiny.corpus}",
        "evaluation.general.texts=5",
        requests=content,
    ).summary
    text = _printed(summary, width=160)
    after = summary["evaluation"]["rounds"][1]["probes"]
    assert _cell(after["locality"]["unchanged"]) in text
    assert _cell(after["rewrite"]["generated_exact"]) in text
    [line] = [line for line in text.splitlines() if "portability: one_hop" in line]
    before = summary["evaluation"]["rounds"][0]["probes"]["portability: one_hop"]
    cells = line.split("unedited")[1]
    assert _cell(before["success"]) in cells and _cell(before["exact"]) in cells
    assert "generated exactly" in text
    fluency = after["generation"]["fluency"]
    assert f"edited {fluency:.2f}" in text and "generation " not in text
    before, edited = summary["general"]
    [line] = [line for line in text.splitlines() if "perplexity" in line]
    assert f"{before['perplexity']:.4g}" in line and f"{edited['perplexity']:.4g}" in line
    assert f"{edited['update_norm']['1']:.4g}" in text


def test_each_scored_round_of_a_study_has_its_name(study: Path) -> None:
    rounds = read(study).summary["evaluation"]["rounds"]
    text = _printed(read(study).summary, width=160)
    assert len(rounds) == 11
    for entry in rounds[1:]:
        assert text.count(f"round {entry['round']} ") >= 4  # ES, PS, NS, S
    assert text.count("│ unedited") == 4 and "│ edited" not in text
