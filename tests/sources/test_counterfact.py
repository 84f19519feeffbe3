"""The CounterFact reader; run with `pytest tests/sources/test_counterfact.py`."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.requests import EditRequest
from pipeline.sources import read_requests

RECORD: dict[str, Any] = {
    "case_id": 12,
    "pararel_idx": 99,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "P1303",
        "target_new": {"str": "flute", "id": "Q1"},
        "target_true": {"str": "harp", "id": "Q2"},
        "subject": "Ana Lind",
    },
    "paraphrase_prompts": ["Ana Lind, on the"],
    "rephrase_prompt": "unused",
    "neighborhood_prompts": ["Bo Ek plays the", "Cy Ode plays the"],
    "attribute_prompts": ["unused"],
    "generation_prompts": ["Ana Lind is known for"],
}

Change = Callable[[dict[str, Any]], object]


def test_every_field(tmp_path: Path) -> None:
    path = tmp_path / "cf.json"
    other = copy.deepcopy(RECORD) | {"case_id": "x1"}
    other["requested_rewrite"]["subject"] = "Di Fay"
    del other["requested_rewrite"]["target_true"], other["requested_rewrite"]["relation_id"]
    path.write_text(json.dumps([RECORD, other]))
    first, second = read_requests(str(path), "counterfact")
    assert first.request == EditRequest(
        case_id="12",
        subject="Ana Lind",
        prompt="{} plays the",
        target_new="flute",
        target_true="harp",
        relation_id="P1303",
        paraphrase_prompts=("Ana Lind, on the",),
        neighborhood_prompts=("Bo Ek plays the", "Cy Ode plays the"),
        generation_prompts=("Ana Lind is known for",),
    )
    assert (first.row, first.source, first.status) == (0, str(path), "accepted")
    assert first.fields["target_true"] == "harp"
    assert second.request is not None
    assert (second.request.case_id, second.request.target_true) == ("x1", None)


def rewrite(**changes: Any) -> Change:
    return lambda record: record["requested_rewrite"].update(changes)


def top(**changes: Any) -> Change:
    return lambda record: record.update(changes)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (rewrite(subject=" "), ["requested_rewrite.subject: is blank; write the subject"]),
        (rewrite(subject=3), ["requested_rewrite.subject: is a number, expected a string"]),
        (rewrite(subject=None), ["requested_rewrite.subject: is null, expected a string"]),
        (rewrite(prompt="Ana plays"), ["requested_rewrite.prompt: has no {}; write {}"]),
        (rewrite(prompt="{} {}"), ["requested_rewrite.prompt: has {} 2 times"]),
        (rewrite(target_new={"str": ""}), ["requested_rewrite.target_new.str: is empty; write"]),
        (rewrite(target_new={"str": True}), ["requested_rewrite.target_new.str: is a boolean"]),
        (rewrite(target_new={}), ["requested_rewrite.target_new.str: is missing; add it"]),
        (rewrite(target_new="flute"), ["requested_rewrite.target_new: is a string, expected an"]),
        (rewrite(target_true=["a"]), ["requested_rewrite.target_true: is a list, expected an"]),
        (
            rewrite(target_new={"str": "harp "}),
            ["requested_rewrite.target_true.str: is the same as target_new, 'harp'"],
        ),
        (rewrite(relation_id=4), ["requested_rewrite.relation_id: is a number"]),
        (rewrite(subject="\ud800"), ["requested_rewrite.subject: is not valid Unicode"]),
        (top(requested_rewrite=[]), ["requested_rewrite: is a list, expected an object"]),
        (lambda r: r.pop("requested_rewrite"), ["requested_rewrite: is missing; add it"]),
        (
            lambda r: r["requested_rewrite"].pop("prompt"),
            ["requested_rewrite.prompt: is missing; add it"],
        ),
        (
            lambda r: r["requested_rewrite"].pop("target_new"),
            ["requested_rewrite.target_new: is missing; add it"],
        ),
        (lambda r: r.pop("case_id"), ["case_id: is missing; add it"]),
        (top(case_id=1.5), ["case_id: is a number, expected a string"]),
        (top(case_id=True), ["case_id: is a boolean, expected a string"]),
        (top(case_id=""), ["case_id: is empty"]),
        (top(paraphrase_prompts="a"), ["paraphrase_prompts: is a string, expected a list"]),
        (top(paraphrase_prompts=None), ["paraphrase_prompts: is null, expected a list"]),
        (
            top(neighborhood_prompts=["a", ["b"]]),
            ["neighborhood_prompts[1]: is a list, expected a string"],
        ),
        (
            top(generation_prompts=["", {}], case_id=[]),
            [
                "case_id: is a list, expected a string",
                "generation_prompts[0]: is empty",
                "generation_prompts[1]: is an object, expected a string",
            ],
        ),
    ],
)
def test_bad_records_are_named_by_their_own_fields(
    tmp_path: Path, change: Change, lines: list[str]
) -> None:
    bad = copy.deepcopy(RECORD)
    change(bad)
    good = copy.deepcopy(RECORD)
    path = tmp_path / "cf.json"
    path.write_text(json.dumps([bad, good]))
    rejected, accepted = read_requests(str(path), "counterfact")
    assert (rejected.status, rejected.request) == ("rejected", None)
    found = rejected.reason.split("\n")
    assert len(found) == len(lines)
    for line, expected in zip(found, lines, strict=True):
        assert line.startswith(f"{path}: row 0, field {expected}")
        assert "; " in line
    assert accepted.status == "accepted"


def test_what_could_be_read_is_kept_for_storing(tmp_path: Path) -> None:
    bad = copy.deepcopy(RECORD)
    bad["case_id"] = None
    bad["requested_rewrite"] |= {"subject": "a\ud800", "target_true": 4, "relation_id": 4.5}
    path = tmp_path / "cf.json"
    path.write_text(json.dumps([bad, 3, None]))
    first, second, third = read_requests(str(path), "counterfact")
    assert first.fields == {
        "case_id": "row-0",
        "subject": "a\\ud800",
        "prompt": "{} plays the",
        "target_new": "flute",
        "target_true": None,
        "relation_id": None,
    }
    assert second.fields["case_id"] == "row-1"
    assert second.reason.startswith(f"{path}: row 1: is a number, expected an object; ")
    assert third.reason.startswith(f"{path}: row 2: is null, expected an object; ")


def test_long_lists_of_problems_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "cf.json"
    path.write_text(json.dumps([RECORD | {"neighborhood_prompts": [0] * 500}]))
    (row,) = read_requests(str(path), "counterfact")
    lines = row.reason.split("\n")
    assert len(lines) == 11
    assert lines[-1] == f"{path}: row 0: 490 more problems"
