"""Any request survives any format, any bytes give an answer; hypothesis writes the files."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.requests import STORED_FIELDS, EditRequest, RequestRow
from pipeline.sources import jsonl, parquet, read_requests
from tests.fuzzing import damaged, fuzz

# One file a test is written again for every example; nothing of an example outlives it.
files = fuzz(40, 500)

TRICKY = ["{}", "{", "}", '"', "'", "\\", "\n", "\r", "\u2028", "\x85", "\u200f", "\u202e", "\0"]
text = st.one_of(
    st.text(min_size=1, max_size=12),
    st.lists(st.sampled_from([*TRICKY, "a", "\u00e9", "\U0001f600", " "]), min_size=1).map("".join),
)
filled = text.filter(str.strip)
prompts = st.lists(text, max_size=3).map(tuple)
probes = st.lists(st.fixed_dictionaries({"prompt": text, "target": filled}), max_size=2).map(tuple)
named_probes = st.lists(
    st.fixed_dictionaries({"prompt": text, "target": filled}, optional={"aspect": text}), max_size=2
).map(tuple)
answered_probes = st.lists(
    st.fixed_dictionaries(
        {"prompt": text, "target": filled}, optional={"aspect": text, "target_true": filled}
    ).filter(lambda p: p["target"].strip() != p.get("target_true", "").strip()),
    max_size=2,
).map(tuple)
templates = st.tuples(text, text).map("{}".join).filter(lambda prompt: prompt.count("{}") == 1)


def requests(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[EditRequest]:
    needed = {"case_id": filled, "subject": filled, "prompt": templates, "target_new": filled}
    return (
        st.fixed_dictionaries(needed | fields)
        .filter(lambda v: (v.get("target_true") or "").strip() != v["target_new"].strip())
        .map(EditRequest.model_validate)
    )


truth = {"target_true": st.none() | filled}
full_requests = requests(
    **truth,
    relation_id=st.none() | st.text(max_size=5),
    paraphrase_prompts=prompts,
    neighborhood_prompts=prompts,
    locality=named_probes,
    portability=answered_probes,
    generation_prompts=prompts,
)
counterfact_requests = requests(
    **truth,
    relation_id=st.none() | st.text(max_size=5),
    paraphrase_prompts=prompts,
    neighborhood_prompts=prompts,
    locality=named_probes,
    portability=answered_probes,
    generation_prompts=prompts,
)
questions = st.fixed_dictionaries(
    {"prompt": text.map(lambda t: t.rstrip("?") + "?"), "target": filled}
).filter(lambda probe: probe["prompt"] != "?" and probe["prompt"][:-1].strip())
zsre_requests = requests(
    **truth,
    case_id=st.just("0"),
    paraphrase_prompts=prompts,
    locality=st.lists(questions, max_size=1).map(tuple),
)
easyedit_requests = requests(
    **truth, paraphrase_prompts=prompts, locality=probes, portability=probes
)


def only(path: Path, format: str) -> EditRequest:
    (row,) = read_requests(path, format)
    assert row.request is not None, row.reason
    return row.request


def as_counterfact(request: EditRequest) -> dict[str, Any]:
    return {
        "case_id": request.case_id,
        "requested_rewrite": {
            "prompt": request.prompt,
            "subject": request.subject,
            "relation_id": request.relation_id,
            "target_new": {"str": request.target_new},
            "target_true": request.target_true and {"str": request.target_true},
        },
        "paraphrase_prompts": request.paraphrase_prompts,
        "neighborhood_prompts": request.neighborhood_prompts,
        "locality": [probe.model_dump(exclude_none=True) for probe in request.locality],
        "portability": [probe.model_dump(exclude_none=True) for probe in request.portability],
        "generation_prompts": request.generation_prompts,
    }


def as_zsre(request: EditRequest) -> dict[str, Any]:
    record: dict[str, Any] = {
        "subject": request.subject,
        "src": request.text,
        "alt": request.target_new,
        "answers": [request.target_true] if request.target_true else [],
        "rephrase": request.paraphrase_prompts,
    }
    for probe in request.locality:
        record |= {"loc": "nq question: " + probe.prompt[:-1], "loc_ans": probe.target}
    return record


def as_easyedit(request: EditRequest) -> dict[str, Any]:
    record: dict[str, Any] = {
        "case_id": request.case_id,
        "prompt": request.text,
        "subject": request.subject,
        "target_new": request.target_new,
        "rephrase_prompt": request.paraphrase_prompts,
        "locality_prompt": [probe.prompt for probe in request.locality],
        "locality_ground_truth": [probe.target for probe in request.locality],
        "portability_prompt": [probe.prompt for probe in request.portability],
        "portability_ground_truth": [probe.target for probe in request.portability],
    }
    return record | ({"ground_truth": request.target_true} if request.target_true else {})


def assume_first_occurrence(request: EditRequest) -> None:
    """Formats without a template mark the subject's first place; other requests do not fit in."""
    assume(request.text.find(request.subject) == request.subject_span[0])


@files
@given(request=counterfact_requests, ascii_only=st.booleans())
def test_counterfact(tmp_path: Path, request: EditRequest, ascii_only: bool) -> None:
    path = tmp_path / "r.json"
    text = json.dumps([as_counterfact(request)], ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8")
    assert only(path, "counterfact") == request


@files
@given(request=zsre_requests)
def test_zsre(tmp_path: Path, request: EditRequest) -> None:
    assume_first_occurrence(request)
    path = tmp_path / "r.json"
    path.write_text(json.dumps([as_zsre(request)]))
    assert only(path, "zsre") == request


@files
@given(request=easyedit_requests)
def test_easyedit(tmp_path: Path, request: EditRequest) -> None:
    assume_first_occurrence(request)
    path = tmp_path / "r.json"
    path.write_text(json.dumps([as_easyedit(request)]))
    assert only(path, "easyedit") == request


def distinct(request: EditRequest) -> str:
    return request.case_id


def distinct_edits(found: list[EditRequest]) -> bool:
    return len({(r.subject, r.prompt) for r in found}) == len(found)


several = st.lists(full_requests, min_size=1, max_size=2, unique_by=distinct).filter(distinct_edits)


@files
@given(found=several)
def test_jsonl(tmp_path: Path, found: list[EditRequest]) -> None:
    path = tmp_path / "r.jsonl"
    jsonl.write_requests(found, str(path))
    assert [row.request for row in read_requests(path, "jsonl")] == found


@files
@given(found=several)
def test_parquet(tmp_path: Path, found: list[EditRequest]) -> None:
    path = tmp_path / "r.parquet"
    parquet.write_requests(found, str(path))
    assert [row.request for row in read_requests(path, "parquet")] == found


@fuzz(8, 60)
@given(found=several)
def test_dataset(tmp_path_factory: pytest.TempPathFactory, found: list[EditRequest]) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved")
    table = pa.Table.from_pylist([r.model_dump() for r in found], schema=parquet.SCHEMA)
    datasets.Dataset(table).save_to_disk(folder)
    assert [row.request for row in read_requests(folder, "dataset")] == found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("{} a"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
# Lone surrogates cannot come out of st.text, but JSON's escapes can make them.
json_values = json_values | st.sampled_from(["\ud800", "a\udfff", ["\ud800"], {"\ud800": 1}])
SOURCE_KEYS = [
    *EditRequest.model_fields,
    *("requested_rewrite", "src", "alt", "answers", "rephrase", "loc", "loc_ans", "ground_truth"),
    *("rephrase_prompt", "locality_prompt", "locality_ground_truth", "portability_prompt"),
]
GOOD: dict[str, dict[str, Any]] = {
    "counterfact": {
        "case_id": 1,
        "requested_rewrite": {"subject": "a", "prompt": "{} b", "target_new": {"str": "c"}},
    },
    "zsre": {"subject": "a", "src": "a b", "alt": "c", "loc": "d", "loc_ans": "e"},
    "easyedit": {"subject": "a", "prompt": "a b", "target_new": "c", "rephrase_prompt": "d"},
    "jsonl": {"case_id": "1", "subject": "a", "prompt": "{} b", "target_new": "c"},
}


@st.composite
def records(draw: st.DrawFn, format: str) -> object:
    """Anything, or a good record with some of its keys (and of the rewrite's) spoilt."""
    if draw(st.booleans()):
        return draw(json_values)
    record = dict(GOOD[format])
    record |= draw(st.dictionaries(st.sampled_from(SOURCE_KEYS), json_values, max_size=3))
    if isinstance(rewrite := record.get("requested_rewrite"), dict):
        keys = st.sampled_from(["subject", "prompt", "target_new", "target_true", "relation_id"])
        record["requested_rewrite"] = rewrite | draw(st.dictionaries(keys, json_values, max_size=2))
    return record


def check(rows: list[RequestRow], number: int) -> None:
    """Every record is one row that can be stored, and says why when it is not accepted."""
    assert [row.row for row in rows] == list(range(number))
    for row in rows:
        assert (row.status == "accepted") == (row.request is not None) == (row.reason == "")
        assert all(f": row {row.row}" in line for line in row.reason.splitlines())
        assert set(row.fields) == set(STORED_FIELDS)
        assert row.fields["case_id"]
        pa.array(list(row.fields.values()), pa.string()).validate(full=True)
        row.reason.encode("utf-8")


@fuzz(60, 500)
@pytest.mark.parametrize("format", ["counterfact", "zsre", "easyedit", "jsonl"])
@given(data=st.data())
def test_every_record_of_any_list_is_one_row(
    tmp_path: Path, format: str, data: st.DataObject
) -> None:
    found = data.draw(st.lists(records(format), min_size=1, max_size=4))
    path = tmp_path / "r.json"
    if format == "jsonl":
        path.write_text("\n".join(map(json.dumps, found)))
        if not any(isinstance(record, dict) for record in found):
            with pytest.raises(InputError, match="no line is a JSON object"):
                read_requests(path, format)
            return
    else:
        path.write_text(json.dumps(found))
    check(read_requests(path, format), len(found))


# What one Parquet column can hold: values of one type, or none.
whole = st.integers(-(2**63), 2**63 - 1)
storable = st.text(max_size=5) | st.just("{} a")
column_values = [
    *(st.none(), st.booleans(), whole, st.floats(), storable, st.binary(max_size=5)),
    *(st.datetimes(), st.dates(), st.lists(storable, max_size=3), st.lists(whole, max_size=2)),
    st.lists(st.fixed_dictionaries({"prompt": storable, "target": st.none() | storable})),
    st.fixed_dictionaries({"str": st.none() | storable, "id": whole}),
]
columns = st.sampled_from(column_values).flatmap(
    lambda values: st.lists(st.none() | values, min_size=3, max_size=3)
)
FIELDS = ["case_id", "subject", "prompt", "target_new", "paraphrase_prompts", "locality"]


@files
@given(found=st.fixed_dictionaries(dict.fromkeys(FIELDS, columns)))
def test_every_row_of_any_parquet_is_one_row(
    tmp_path: Path, found: dict[str, list[object]]
) -> None:
    """Whatever type the columns have."""
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(found), path)
    check(read_requests(path, "parquet"), 3)


@fuzz(60, 500)
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
@given(
    content=st.binary() | st.text().map(str.encode) | json_values.map(json.dumps).map(str.encode)
)
@example(content=b"PAR1\x00\x00\x00\x00PAR1")
@example(content=b'[{"requested_rewrite": {"target_new": {"str": {}}}}]')
@example(content=b'[{"requested_rewrite": [1, {}], "questions": [[]], "new_answer": {}}]')
@example(
    content=b'[{"prompt": "a", "subject": "a", "target_new": "b", "locality": {"": {"": []}}}]'
)
def test_any_bytes_give_rows_or_an_input_error(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"r.{ending}"
    path.write_bytes(content)
    for format in ("auto", "counterfact", "zsre", "easyedit", "mquake", "jsonl", "parquet"):
        try:
            rows = read_requests(path, format)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            check(rows, len(rows))
            assert rows


@fuzz(40, 1500)
@pytest.mark.parametrize("format", ["counterfact", "jsonl", "parquet"])
@given(data=st.data())
def test_any_damage_to_a_sound_file(tmp_path: Path, format: str, data: st.DataObject) -> None:
    path = tmp_path / f"r.{format if format != 'counterfact' else 'json'}"
    if format == "parquet":
        parquet.write_requests([EditRequest(**GOOD["jsonl"])], str(path))
    else:
        path.write_text(json.dumps(GOOD[format] if format == "jsonl" else [GOOD[format]] * 2))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        rows = read_requests(path, format)
    except InputError as error:
        assert str(path) in str(error)
    else:
        check(rows, len(rows))
