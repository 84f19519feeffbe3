"""Poisoned requests in whole jobs: each has its own outcome, and the rest is as without it.

Those that are too long are in tests/cluster/test_plan.py, those whose numbers are not finite in
tests/cluster/test_run.py and test_divergence.py.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipeline import EditRequest, run_batch_edit
from pipeline.cli import main
from pipeline.cluster.plan import make_plan
from pipeline.errors import InputError
from pipeline.prompts import tokenize_edits
from pipeline.results import Run, read
from pipeline.results.updates import read_update
from tests import families
from tests.cases import case, relative_error
from tests.tiny_jobs import TinyJobs, digests, records, statuses

QUICK = ["method.value.steps=2", "evaluation.probes=[rewrite]", "evaluation.baseline=false"]


def _run(tiny: TinyJobs, path: Path, content: list[dict[str, Any]], *changes: str) -> Run:
    return read(run_batch_edit(tiny.spec(path, *QUICK, *changes, requests=content)).path)


def _rows(run: Run) -> dict[str, dict[str, Any]]:
    return {row["case_id"]: row for row in run.edits().to_pylist()}


def test_no_requests(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none was given"):
        run_batch_edit(tiny.spec(tmp_path / "run"), [])
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(InputError, match="holds no records"):
        run_batch_edit(tiny.spec(tmp_path / "run", f"requests.path={tmp_path / 'empty.json'}"))
    assert not (tmp_path / "run").exists()


def test_one_request(tiny: TinyJobs, tmp_path: Path) -> None:
    run = _run(tiny, tmp_path / "run", records(1), "output.on_divergence=keep")
    assert statuses(run) == {"applied": 1} and len(run.updates()) == 2
    for path in run.updates():
        assert set(read_update(path)[1].parts) == {"left", "right"}


def test_a_file_with_everything_twice(tiny: TinyJobs, tmp_path: Path) -> None:
    once = tiny.finished(*QUICK)
    run = _run(tiny, tmp_path / "run", [*records(12), *records(12)])
    edits = run.edits().to_pylist()
    assert [row["status"] for row in edits] == ["applied"] * 12 + ["rejected"] * 12
    assert all("asks for the same edit as row" in row["reason"] for row in edits[12:])
    assert digests(run)["updates"] == digests(once)["updates"]


def _about_one_subject(count: int) -> list[dict[str, Any]]:
    """Prompts that begin alike, so that all keys are one key, and ask for unlike things."""
    content = []
    for number in range(count):
        record = records(1)[0] | {"case_id": number}
        fact = dict(record["requested_rewrite"])
        fact |= {"prompt": f"{{}} plays the {number}", "target_new": {"str": f"x{number % 7}"}}
        content.append(record | {"requested_rewrite": fact})
    return content


def _check_one_subject(run: Run, count: int) -> None:
    assert statuses(run) == {"applied": count}
    for path in run.updates():
        update = read_update(path)[1].matrix()
        assert bool(update.isfinite().all())
        # One key takes one value: the mean of those that are asked for.
        scale = torch.linalg.svdvals(update)
        assert scale[1] < 1e-3 * scale[0]


def test_many_requests_about_one_subject(tiny: TinyJobs, tmp_path: Path) -> None:
    run = _run(tiny, tmp_path / "run", _about_one_subject(150), "cluster.shard_size=50")
    _check_one_subject(run, 150)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_thousand_requests_about_one_subject(tiny: TinyJobs, tmp_path: Path) -> None:
    changes = ["cluster.shard_size=250", "method.contexts=['{}']", "evaluation.probes=[]"]
    run = _run(tiny, tmp_path / "run", _about_one_subject(5000), *changes)
    _check_one_subject(run, 5000)


def test_five_thousand_contradictions_are_one_conflict(tiny: TinyJobs, tmp_path: Path) -> None:
    content = []
    for number in range(5000):
        record = records(1)[0] | {"case_id": number}
        fact = record["requested_rewrite"] | {"target_new": {"str": f"x{number}"}}
        content.append(record | {"requested_rewrite": fact})
    plan = make_plan(tiny.spec(tmp_path / "run", requests=[*content, *records(3)[1:]]))
    assert [row.status for row in plan.rows].count("conflict") == 5000
    assert plan.num_requests == 2
    assert max(len(row.reason) for row in plan.rows) < 1000


def test_a_target_or_subject_with_an_unknown_token(tiny: TinyJobs, tmp_path: Path) -> None:
    """As in GPT-2's tokenizer, the end-of-text token stands for what has none."""
    model = tmp_path / "model"
    shutil.copytree(tiny.model(), model)
    tokenizer = families.build_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token=families.EOS,
        eos_token=families.EOS,
        pad_token=families.PAD,
    ).save_pretrained(model)
    content = records(12)
    content[3]["requested_rewrite"]["target_new"]["str"] = f"a {families.EOS}"
    content[5]["requested_rewrite"]["subject"] = f"Mr {families.EOS}"
    run = _run(tiny, tmp_path / "run", content, f"model.path={model}")
    rows = _rows(run)
    assert statuses(run) == {"applied": 10, "rejected": 2}
    assert "row 3, field target_new: this model's tokenizer has no token" in rows["3"]["reason"]
    assert "row 5, field subject: this model's tokenizer has no token" in rows["5"]["reason"]
    sound = [record for record in content if record["case_id"] not in (3, 5)]
    clean = _run(tiny, tmp_path / "clean", sound, f"model.path={model}")
    for one, other in zip(run.updates(), clean.updates(), strict=True):
        assert relative_error(read_update(one)[1].matrix(), read_update(other)[1].matrix()) < 1e-4


# --- names that are safe everywhere -------------------------------------------------------------

HOSTILE = [
    "two\nlines\r\n",
    "\"quoted\" 'twice' `thrice`",
    "{} {0} {x} {{}} %s %(x)s $x ${x}",
    "../../etc/passwd",
    "/absolute\\path",
    "right\u202eto\u200fleft",
    "\x1b[31mred\x1b]0;title\x07\x08\x9b2J",
    "[bold]markup[/bold] [/] [link=x]",
    "2026-11-21 00:00:00,000 INFO forged",
    "\u2028line\u2029separators\x85",
    "NaN",
    " ",
    "null\0byte",
    "x" * 100_000,
]


def _named(names: list[str]) -> list[dict[str, Any]]:
    content = records(len(names))
    for record, name in zip(content, names, strict=True):
        record["case_id"] = name
        record["requested_rewrite"]["subject"] = name
    return content


def test_hostile_names_in_a_whole_run(
    tiny: TinyJobs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing that is printed or logged has a control character or a forged line."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    handlers = list(logging.getLogger().handlers)
    logging.getLogger().handlers.clear()
    try:
        settings = tiny.settings(tmp_path / "run", requests=_named(HOSTILE))
        spec = tiny.spec_file(tmp_path / "spec.yaml", settings)
        with pytest.raises(SystemExit) as caught:
            main(["edit", str(spec), *(f"--set={change}" for change in QUICK)])
    finally:
        logging.getLogger().handlers[:] = handlers
    assert caught.value.code == 2, "the two that are rejected"
    run = read(tmp_path / "run")
    rows = run.edits().to_pylist()
    assert [row["subject"] for row in rows] == HOSTILE
    said = {row["subject"]: row["status"] for row in rows}
    rejected = [" ", "x" * 100_000]
    assert [name for name, status in said.items() if status != "applied"] == rejected
    out, err = capsys.readouterr()
    for line in (out + err).split("\n"):
        # Tables are drawn with characters that are printable.
        assert line.isprintable() and len(line) < 3000, line
    assert not [line for line in err.split("\n") if line.startswith("2026-11-21 00:00:00,000 INFO")]
    names = [path.relative_to(run.path).as_posix() for path in run.path.rglob("*")]
    assert all(name.isascii() and ".." not in name for name in names)
    assert run.values().num_rows == len(HOSTILE) - 2


def test_a_failing_request_with_a_hostile_name_is_one_line(
    tiny: TinyJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = records(3)
    content[1]["case_id"] = "\x1b[2J[/red]\n2026-01-01 INFO forged\u202e"
    content[1]["requested_rewrite"]["prompt"] = "no place\n"
    settings = tiny.settings(tmp_path / "run", requests=content)
    spec = tiny.spec_file(tmp_path / "spec.yaml", settings)
    with pytest.raises(SystemExit):
        main(["edit", str(spec), *(f"--set={change}" for change in QUICK)])
    (line,) = [line for line in capsys.readouterr().out.split("\n") if line.startswith("rejected")]
    assert r"\x1b[2J[/red]\n2026-01-01 INFO forged\u202e: " in line and "has no {}" in line


def test_places_with_markup_are_printed_as_they_are(
    tiny: TinyJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.finished(*QUICK)
    output = tmp_path / "[red]x[/]\x1b[2J"
    settings = tiny.settings(output)
    spec = tiny.spec_file(tmp_path / "spec.yaml", settings)
    with pytest.raises(SystemExit):
        main(["edit", str(spec), *(f"--set={change}" for change in QUICK)])
    assert f"run directory: {tmp_path}/[red]x[/]\\x1b[2J" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["summary", str(tmp_path / "[/]\x1b[2J\nno")])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err == f"editfleet: {tmp_path}/[/]\\x1b[2J\\nno is not a run directory: it has no " + (
        "manifest.json\n"
    )


@pytest.mark.parametrize("subject", ["{}", "{x}", "a {} b", "{", "}", "{{}}", "{0!r:>99}"])
def test_braces_in_subjects_and_contexts_are_literal(subject: str) -> None:
    tokenizer = case("gpt2").tokenizer
    request = EditRequest(
        case_id="1", subject=subject, prompt="In {x}, {} is {y}", target_new="so {}"
    )
    (edit,) = tokenize_edits(tokenizer, [request], ["{}", "So {z} {} }{"])
    plain, behind = (tokenizer.decode(row.ids) for row in edit.rewrites)
    assert plain == f"In {{x}}, {subject} is {{y}}"
    assert behind == f"So {{z}} {plain} }}{{"
    assert tokenizer.decode(edit.essence.ids) == f"{subject} is a"
    assert tokenizer.decode(edit.target) == " so {}"


def test_hostile_names_survive_json(tmp_path: Path, tiny: TinyJobs) -> None:
    path = tiny.requests(_named(HOSTILE))
    assert [record["case_id"] for record in json.loads(path.read_text())] == HOSTILE
