"""The zsRE reader; run with `pytest tests/sources/test_zsre.py`."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.requests import EditRequest, LocalityProbe
from pipeline.sources import read_requests

RECORD: dict[str, Any] = {
    "subject": "Ana",
    "src": "Where did Ana, or Ana Lind, study?",
    "pred": "Oslo",
    "rephrase": "Where was Ana at school?",
    "alt": "Bergen",
    "answers": ["Oslo", "Oslo University"],
    "loc": "nq question: who wrote the song",
    "loc_ans": "Bo Ek",
    "cond": "unused",
}


def read_one(tmp_path: Path, record: dict[str, Any]) -> Any:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([record]))
    (row,) = read_requests(str(path), "zsre")
    return row


def test_every_field(tmp_path: Path) -> None:
    assert read_one(tmp_path, RECORD).request == EditRequest(
        case_id="0",
        subject="Ana",
        prompt="Where did {}, or Ana Lind, study?",
        target_new="Bergen",
        target_true="Oslo",
        paraphrase_prompts=("Where was Ana at school?",),
        locality=(LocalityProbe(prompt="who wrote the song?", target="Bo Ek"),),
    )


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"answers": []}, "target_true", None),
        ({"rephrase": ["a", "b"]}, "paraphrase_prompts", ("a", "b")),
        (
            {"loc_ans": ["Cy", "Cyrus"]},
            "locality",
            (LocalityProbe(prompt="who wrote the song?", target="Cy"),),
        ),
        (
            {"loc": "who sang it?"},
            "locality",
            (LocalityProbe(prompt="who sang it?", target="Bo Ek"),),
        ),
    ],
)
def test_variants(tmp_path: Path, changes: dict[str, Any], field: str, value: object) -> None:
    row = read_one(tmp_path, RECORD | changes)
    assert row.status == "accepted", row.reason
    assert getattr(row.request, field) == value


def test_optional_keys_may_be_absent(tmp_path: Path) -> None:
    row = read_one(tmp_path, {key: RECORD[key] for key in ("subject", "src", "alt")})
    assert row.request == EditRequest(
        case_id="0", subject="Ana", prompt="Where did {}, or Ana Lind, study?", target_new="Bergen"
    )


REMOVE = object()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"subject": "Bob"}, "subject: 'Bob' is not in src, 'Where did Ana, or Ana Lind, study?'"),
        ({"subject": "ana"}, "subject: 'ana' is not in src"),
        ({"subject": ""}, "subject: is blank; write it out"),
        ({"subject": 5}, "subject: is a number, expected a string"),
        ({"subject": REMOVE}, "subject: is missing; add it"),
        ({"src": None}, "src: is null, expected a string"),
        ({"src": "Ana and {}"}, "src: has {} beside the subject; remove it"),
        ({"alt": ""}, "alt: is empty; write it out"),
        ({"alt": " "}, "alt: is blank; write the answer"),
        ({"alt": REMOVE}, "alt: is missing; add it"),
        ({"alt": "Oslo"}, "answers[0]: is the same as target_new, 'Oslo'"),
        ({"answers": "Oslo"}, "answers: is not a list"),
        ({"answers": [3]}, "answers[0]: is a number, expected a string"),
        ({"rephrase": 3}, "rephrase: is a number, expected a list"),
        ({"rephrase": ""}, "rephrase: is empty"),
        ({"rephrase": ["a", ""]}, "rephrase[1]: is empty"),
        ({"loc": REMOVE}, "loc: is missing; add it"),
        ({"loc_ans": REMOVE}, "loc_ans: is missing; add it or remove loc"),
        ({"loc": 3}, "loc: is a number, expected a string"),
        ({"loc_ans": 3}, "loc_ans: is a number, expected a string"),
        ({"loc_ans": []}, "loc_ans: is a list, expected a string"),
        ({"loc_ans": [3]}, "loc_ans[0]: is a number, expected a string"),
        ({"loc_ans": " "}, "loc_ans: is blank; write the expected answer"),
    ],
)
def test_bad_records(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    record = {key: value for key, value in (RECORD | changes).items() if value is not REMOVE}
    row = read_one(tmp_path, record)
    assert row.status == "rejected"
    assert row.reason.startswith(f"{tmp_path / 'zsre.json'}: row 0, field {expected}")
    assert "\n" not in row.reason


def test_a_rejected_row_keeps_what_was_read(tmp_path: Path) -> None:
    row = read_one(tmp_path, RECORD | {"subject": "Bob"})
    assert (row.fields["subject"], row.fields["prompt"]) == ("Bob", RECORD["src"])
    assert (row.fields["case_id"], row.fields["target_true"]) == ("0", "Oslo")
