"""Our own columns in two formats; run with `pytest tests/sources/test_own_columns.py`."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.requests import EditRequest
from pipeline.sources import jsonl, parquet, read_requests

RECORD: dict[str, Any] = {
    "case_id": "a",
    "subject": "Ana",
    "prompt": "{} sings",
    "target_new": "alto",
}


def write_lines(path: Path, *lines: object) -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_jsonl_fields_and_blank_lines(tmp_path: Path) -> None:
    full = RECORD | {
        "case_id": "b",
        "subject": "Bo",
        "target_true": None,
        "locality": [{"prompt": "q", "target": "t"}],
        "generation_prompts": ["Bo is"],
    }
    path = write_lines(tmp_path / "r.jsonl", RECORD, "", " \t\r", full, "")
    rows = read_requests(path, "jsonl")
    assert [row.request for row in rows] == [EditRequest(**RECORD), EditRequest(**full)]
    assert [row.row for row in rows] == [0, 1]


def test_jsonl_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """Other Unicode line breaks are legal inside a JSON string."""
    record = RECORD | {"subject": "A\u2028B\x85C\u2029D"}
    path = tmp_path / "r.jsonl"
    path.write_bytes((json.dumps(record, ensure_ascii=False) + "\r\n").encode())
    (row,) = read_requests(path, "jsonl")
    assert row.request is not None
    assert row.request.subject == "A\u2028B\x85C\u2029D"


def test_jsonl_bad_lines_are_rows(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "r.jsonl",
        RECORD,
        "",
        '{"case_id": "x",}',
        "[" * 100_000,
        '{"case_id": ' + "9" * 5000 + "}",
        "3",
        RECORD | {"case_id": "z", "subject": "Zoe"},
    )
    rows = read_requests(path, "jsonl")
    assert [row.status for row in rows] == ["accepted", *["rejected"] * 4, "accepted"]
    assert rows[1].reason.startswith(f"{path}: row 1: not JSON at line 3, column ")
    assert rows[1].reason.endswith("; correct or remove the line")
    assert rows[2].reason.startswith(f"{path}: row 2: not readable as JSON at line 4: nested too")
    assert rows[3].reason.startswith(f"{path}: row 3: not readable as JSON at line 5: ")
    assert rows[4].reason.startswith(f"{path}: row 4: is a number, expected an object; ")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"case_id": 4}, "case_id: is a number, expected a string"),
        ({"paraphrase_prompt": ["a"]}, "paraphrase_prompt: is not a field of a request; remove"),
        ({"a b\n": 1}, "'a b\\n': is not a field of a request"),
        ({"locality": [{"prompt": "q"}]}, "locality[0].target: is missing; add it"),
        ({"locality": ["q"]}, "locality[0]: is a string, expected an object with prompt and"),
        ({"portability": {"prompt": "q"}}, "portability: is an object, expected a list"),
        (
            {"locality": [{"prompt": "q", "target": "t", "x": 1}]},
            "locality[0].x: is not a field of a request",
        ),
        ({"paraphrase_prompts": [["a"]]}, "paraphrase_prompts[0]: is a list, expected a string"),
        ({"generation_prompts": None}, "generation_prompts: is null, expected a list"),
        ({"subject": None}, "subject: is null, expected a string"),
        ({"subject": "\udc80"}, "subject: is not valid Unicode (a lone surrogate)"),
    ],
)
def test_jsonl_bad_records(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", RECORD | changes)
    (row,) = read_requests(path, "jsonl")
    assert row.status == "rejected"
    assert row.reason.startswith(f"{path}: row 0, field {expected}")
    assert "\n" not in row.reason


def test_jsonl_key_that_is_no_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", json.dumps(RECORD | {"\ud800": 1}))
    (row,) = read_requests(path, "jsonl")
    assert row.status == "rejected"
    assert "is not valid Unicode" in row.reason


def test_a_pretty_printed_list_is_no_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps([RECORD], indent=1))
    with pytest.raises(InputError, match="no line is a JSON object; line 1 of the records: not J"):
        read_requests(path, "jsonl")


def test_parquet_null_cells_are_fields_left_away(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    rows = [
        RECORD | {"paraphrase_prompts": None, "relation_id": None},
        RECORD | {"case_id": "b", "subject": None, "paraphrase_prompts": ["x", None]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    first, second = read_requests(path, "parquet")
    assert first.request == EditRequest(**RECORD)
    assert second.reason.split("\n") == [
        f"{path}: row 1, field subject: is missing; add it",
        f"{path}: row 1, field paraphrase_prompts[1]: is null, expected a string; write it as text",
    ]


def test_parquet_wrong_type_is_a_row_problem(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_pylist([RECORD | {"case_id": 4}]), path)
    (row,) = read_requests(path, "parquet")
    assert row.reason.startswith(f"{path}: row 0, field case_id: is a number, expected a string")
    assert row.fields["case_id"] == "4"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"case_id": ["a"]}, "has no column subject; its columns are case_id"),
        ({**{k: [v] for k, v in RECORD.items()}, "paraphrases": [[]]}, "paraphrase_prompts?"),
        ({**{k: [v] for k, v in RECORD.items()}, "zzz": [1]}, "column 'zzz' is not a field of a"),
        ({k: pa.array([], pa.string()) for k in RECORD}, "holds no records"),
    ],
)
def test_parquet_wrong_columns(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(InputError) as caught:
        read_requests(path, "parquet")
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_many_parquet_rows_in_any_order(tmp_path: Path) -> None:
    """More than are made at a time; in row groups, in order, shuffled and from the middle on."""
    count = 2500
    columns = {key: [f"{value}{i}" for i in range(count)] for key, value in RECORD.items()}
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=700)
    names = [f"a{i}" for i in range(count)]
    rows = read_requests(path, "parquet")
    assert [row.fields["case_id"] for row in rows] == names
    assert all(row.request and row.request.target_new == f"alto{row.row}" for row in rows)
    shuffled = read_requests(path, "parquet", shuffle_seed=1)
    assert [row.fields["case_id"] for row in shuffled] == [f"a{row.row}" for row in shuffled]
    assert sorted(row.row for row in shuffled) == list(range(count)) != [r.row for r in shuffled]
    some = read_requests(path, "parquet", offset=1020, limit=10)
    assert [row.fields["case_id"] for row in some] == names[1020:1030]


def test_parquet_names_the_cell_that_is_not_utf8(tmp_path: Path) -> None:
    bad = pa.array([b"fine", b"abc\xff"], pa.binary()).view(pa.string())
    columns = {key: pa.array([f"{value}", f"{value}2"]) for key, value in RECORD.items()}
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table(columns | {"subject": bad}), path)
    with pytest.raises(InputError) as caught:
        read_requests(path, "parquet")
    assert str(caught.value).startswith(
        f"{path}: row 1, field subject: not valid UTF-8 at byte 3 of the cell"
    )


def test_parquet_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    for content in (b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\0" * 50 + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as Parquet"):
            read_requests(path, "parquet")
    for other in (tmp_path, tmp_path / "absent.parquet"):
        with pytest.raises(InputError, match="cannot be read as Parquet"):
            read_requests(other, "parquet")


def test_written_parquet_has_the_promised_columns(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    parquet.write_requests([EditRequest(**RECORD)], str(path))
    assert pq.read_schema(path).remove_metadata().equals(parquet.SCHEMA)
    assert set(parquet.SCHEMA.names) == set(EditRequest.model_fields)


@pytest.mark.parametrize("module", [jsonl, parquet])
def test_a_path_that_cannot_be_written(tmp_path: Path, module: Any) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        module.write_requests([EditRequest(**RECORD)], str(tmp_path / "no" / "dir"))
