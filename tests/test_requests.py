"""Edit requests and their conflicts; run with `pytest tests/test_requests.py`."""

import pickle
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import InputError
from pipeline.requests import (
    STORED_FIELDS,
    EditRequest,
    LocalityProbe,
    RequestRow,
    resolve_conflicts,
)

GOOD: dict[str, Any] = {
    "case_id": "7",
    "subject": "Paris",
    "prompt": "{} is the capital of",
    "target_new": "Italy",
    "target_true": "France",
}


TRUE_TOO = {"prompt": "q", "target": "a", "target_true": "b"}


def make(**changes: Any) -> EditRequest:
    return EditRequest.model_validate(GOOD | changes)


def rows_of(*requests: EditRequest) -> list[RequestRow]:
    return [RequestRow.accept(row, "f.json", request) for row, request in enumerate(requests)]


def test_a_row_shows_the_stored_fields_of_its_request() -> None:
    """A view, not a copy; equal to the dictionary, and pickled with its request."""
    request = make(target_true="Rome")
    (row,) = rows_of(request)
    fields = {name: getattr(request, name) for name in STORED_FIELDS}
    assert row.fields == fields and dict(row.fields) == fields and len(row.fields) == len(fields)
    assert row.fields["target_true"] == "Rome" and "prompt" in row.fields
    with pytest.raises(KeyError):
        row.fields["paraphrase_prompts"]
    assert pickle.loads(pickle.dumps(row)) == row


def statuses(rows: list[RequestRow]) -> list[str]:
    return [row.status for row in rows]


def test_text_and_span() -> None:
    request = make(prompt="In short, {} is")
    assert request.text == "In short, Paris is"
    assert request.text[slice(*request.subject_span)] == "Paris"


@pytest.mark.parametrize(
    ("prompt", "subject", "text"),
    [
        ("{{}} {x} } {", "a", "{a} {x} } {"),
        ("say {} twice", "{}", "say {} twice"),
        ("say {}", "{0} {name}", "say {0} {name}"),
        ("%s \\1 {}", "\\1 %s", "%s \\1 \\1 %s"),
        ("Paris, {}", "Paris", "Paris, Paris"),
    ],
)
def test_braces_and_escapes_are_literal(prompt: str, subject: str, text: str) -> None:
    request = make(prompt=prompt, subject=subject)
    start, stop = request.subject_span
    assert request.text == text
    assert text[start:stop] == subject
    assert text[:start] + "{}" + text[stop:] == prompt


@given(before=st.text(), after=st.text(), subject=st.text(min_size=1))
def test_span_is_where_the_template_says(before: str, after: str, subject: str) -> None:
    prompt = before + "{}" + after
    if prompt.count("{}") != 1 or not subject.strip():
        with pytest.raises(ValidationError):
            make(prompt=prompt, subject=subject)
        return
    request = make(prompt=prompt, subject=subject)
    assert request.text == before + subject + after
    assert request.subject_span == (len(before), len(before) + len(subject))


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"subject": ""}, "subject", "at least 1 character"),
        ({"subject": " \n\u2003"}, "subject", "is blank; write the subject"),
        ({"case_id": " "}, "case_id", "is blank; give every request a name"),
        ({"target_new": "\t"}, "target_new", "is blank; write the answer"),
        ({"target_true": " "}, "target_true", "is blank; write the answer"),
        ({"prompt": "Paris is"}, "prompt", "has no {}; write {} where"),
        ({"prompt": "{} and {}"}, "prompt", "has {} 2 times; write {} once"),
        ({"target_new": " France "}, "target_true", "is the same as target_new, 'France'"),
        ({"subject": "a\ud800"}, "subject", "unicode"),
        ({"prompt": "{} \udfff"}, "prompt", "unicode"),
        ({"target_new": "\ud83d"}, "target_new", "unicode"),
        ({"relation_id": "\ud83d"}, "relation_id", "unicode"),
        ({"paraphrase_prompts": ["a", "\ud83d"]}, "paraphrase_prompts.1", "unicode"),
        ({"neighborhood_prompts": ["a", 3]}, "neighborhood_prompts.1", "valid string"),
        ({"generation_prompts": "abc"}, "generation_prompts", "valid tuple"),
        ({"paraphrase_prompts": [""]}, "paraphrase_prompts.0", "at least 1 character"),
        ({"locality": [{"prompt": "q", "target": " "}]}, "locality.0.target", "is blank"),
        ({"portability": [{"prompt": "q"}]}, "portability.0.target", "required"),
        ({"case_id": 7}, "case_id", "valid string"),
        ({"subject": b"Paris"}, "subject", "valid string"),
        ({"relation": "P36"}, "relation", "not permitted"),
        ({"locality": [TRUE_TOO]}, "locality", "[0] has target_true, but an edit shall not"),
        (
            {"portability": [TRUE_TOO | {"target_true": "a "}]},
            "portability.0.target_true",
            "the same as target, 'a '; leave it away",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make(**changes)
    (detail,) = caught.value.errors()
    assert ".".join(map(str, detail["loc"])) == field
    assert words in detail["msg"]


def test_a_probe_without_a_true_answer_is_written_as_before() -> None:
    """The digest of a run's requests is made of this text."""
    probe = LocalityProbe(prompt="q", target="a")
    assert probe.model_dump_json() == '{"prompt":"q","target":"a","aspect":null}'
    true = LocalityProbe.model_validate(TRUE_TOO)
    assert true.model_dump() == TRUE_TOO | {"aspect": None}


def test_requests_are_frozen_hashable_and_documented() -> None:
    request = make(locality=[LocalityProbe(prompt="q", target="a")])
    with pytest.raises(ValidationError, match="frozen"):
        request.subject = "Rome"  # type: ignore[misc]
    assert len({request, make(locality=[{"prompt": "q", "target": "a"}])}) == 1
    for model in (EditRequest, LocalityProbe):
        assert all(info.description for info in model.model_fields.values())
    (row,) = rows_of(request)
    assert pickle.loads(pickle.dumps(row)) == row


def test_import_needs_no_torch_ray_or_datasets() -> None:
    code = (
        "import sys, pipeline.sources; "
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CONFLICTING = (
    make(case_id="a"),
    make(case_id="b", subject="Rome"),
    make(case_id="c", target_new="Spain"),
    make(case_id="d", target_new="Peru"),
)


def test_conflict_refuse_takes_all_out_and_names_the_others() -> None:
    rows = resolve_conflicts(rows_of(*CONFLICTING), "refuse")
    assert statuses(rows) == ["conflict", "accepted", "conflict", "conflict"]
    assert rows[2].reason == (
        "f.json: row 2, field target_new: conflicts with rows 0 ('Italy'), 3 ('Peru'): same "
        "subject and prompt, different targets; keep one of them or set requests.on_conflict to "
        "first or last"
    )
    assert [row.request for row in rows] == [None, CONFLICTING[1], None, None]
    assert rows[3].fields["target_new"] == "Peru"


@pytest.mark.parametrize(("on_conflict", "kept"), [("first", 0), ("last", 3)])
def test_conflict_first_and_last_keep_one(on_conflict: Any, kept: int) -> None:
    rows = resolve_conflicts(rows_of(*CONFLICTING), on_conflict)
    assert [row.row for row in rows if row.status == "accepted"] == sorted({1, kept})
    assert rows[2].status == "conflict"
    assert f"conflicts with row {kept} (" in rows[2].reason
    assert f"the {on_conflict} one is kept" in rows[2].reason


def test_first_and_last_mean_the_order_of_the_rows_not_of_the_file() -> None:
    rows = list(reversed(rows_of(*CONFLICTING)))
    kept = [row.row for row in resolve_conflicts(rows, "last") if row.status == "accepted"]
    assert kept == [1, 0]


def test_conflict_error_names_file_rows_and_subject() -> None:
    with pytest.raises(InputError) as caught:
        resolve_conflicts(rows_of(*CONFLICTING), "error")
    assert str(caught.value) == (
        "f.json: rows 0 ('Italy'), 2 ('Spain'), 3 ('Peru'), subject 'Paris': the same prompt has "
        "different targets; keep one of them or set requests.on_conflict to refuse, first or last"
    )


def test_unknown_policy() -> None:
    with pytest.raises(InputError, match="'newest' is not known; use one of refuse, last, first"):
        resolve_conflicts([], "newest")  # type: ignore[arg-type]


@pytest.mark.parametrize("on_conflict", ["refuse", "first", "last", "error"])
def test_repetition_keeps_the_first(on_conflict: Any) -> None:
    again = make(case_id="8", target_new=" Italy", relation_id="R")
    rows = resolve_conflicts(rows_of(make(), again), on_conflict)
    assert statuses(rows) == ["accepted", "rejected"]
    assert rows[1].reason == (
        "f.json: row 1, field target_new: asks for the same edit as row 0; remove one of them"
    )


def test_repeated_case_id_is_rejected_and_names_the_first() -> None:
    rows = resolve_conflicts(
        rows_of(make(), make(subject="Rome"), make(subject="{Oslo}")), "refuse"
    )
    assert statuses(rows) == ["accepted", "rejected", "rejected"]
    assert rows[2].reason == (
        "f.json: row 2, field case_id: '7' is taken by row 0; remove one of them"
    )


def test_a_correction_under_the_same_case_id_wins_with_last() -> None:
    rows = rows_of(make(), make(target_new="Spain"))
    assert statuses(resolve_conflicts(rows, "last")) == ["conflict", "accepted"]
    assert statuses(resolve_conflicts(rows, "refuse")) == ["conflict", "conflict"]


def test_same_text_with_another_subject_is_no_conflict() -> None:
    rows = rows_of(
        make(case_id="a", subject="New York", prompt="{} is in"),
        make(case_id="b", subject="New", prompt="{} York is in", target_new="Spain"),
    )
    assert statuses(resolve_conflicts(rows, "refuse")) == ["accepted", "accepted"]


def test_rejected_rows_take_no_part_in_conflicts() -> None:
    bad = RequestRow(0, "f.json", None, "rejected", "why", {"case_id": "7", "subject": "Paris"})
    rows = resolve_conflicts([bad, RequestRow.accept(1, "f.json", make())], "error")
    assert rows[0] is bad
    assert rows[1].status == "accepted"


def test_conflicts_are_found_in_linear_time() -> None:
    """10,000 rows of one subject: quadratic work or reasons would take gigabytes."""
    requests = [make(case_id=str(i), target_new=f"answer {i}") for i in range(10_000)]
    started = time.perf_counter()
    rows = resolve_conflicts(rows_of(*requests), "refuse")
    assert set(statuses(rows)) == {"conflict"}
    assert max(len(row.reason) for row in rows) < 400
    assert "and 9994 more" in rows[0].reason
    assert time.perf_counter() - started < 10


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from("1234")),
        max_size=12,
    ),
    st.sampled_from(["refuse", "first", "last"]),
)
def test_accepted_rows_never_disagree(triples: list[tuple[str, str, str]], policy: Any) -> None:
    requests = [make(subject=s, target_new=t, case_id=c) for s, t, c in triples]
    rows = resolve_conflicts(rows_of(*requests), policy)
    kept = [row.request for row in rows if row.request is not None]
    assert [row.row for row in rows] == list(range(len(triples)))
    assert len({r.subject for r in kept}) == len(kept) == len({r.case_id for r in kept})
    assert all((row.status == "accepted") == (row.request is not None) for row in rows)
    assert all((row.status == "accepted") == (row.reason == "") for row in rows)
