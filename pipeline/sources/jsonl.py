"""Our own columns as JSON Lines: one object a line, its keys the fields of `EditRequest`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.requests import EditRequest
from pipeline.sources.files import load_json_lines, writing
from pipeline.sources.records import Layout, Problem, Records


def read(path: str) -> Records:
    """Read a JSON Lines file; a line that is not JSON becomes a rejected row.

    Raises:
        InputError: the file cannot be read, or no line of it is a JSON object.
    """
    return Records(load_json_lines(path), LAYOUT)


def write_requests(rows: Iterable[EditRequest], path: str) -> None:
    """Write requests, one a line, leaving away the fields that have their default.

    Raises:
        InputError: the file cannot be written.
    """
    fields = (request.model_dump(exclude_defaults=True) for request in rows)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in fields)
    with writing(path):
        Path(path).write_text(text, encoding="utf-8", newline="\n")


def _to_fields(record: Mapping[str, Any], row: int, problems: list[Problem]) -> dict[str, Any]:
    return dict(record)


LAYOUT = Layout("jsonl", _to_fields)
