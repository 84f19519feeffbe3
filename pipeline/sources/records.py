"""From a record of any layout to a `RequestRow`, with every problem named by its source field."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pipeline.requests import STORED_FIELDS, EditRequest, RequestRow, quote

LONGEST_REASON = 10
"""Problems of one record that its reason lists; the rest is counted."""


_GIVEN_FIELDS: dict[frozenset[str], set[str]] = {}
_REPEATED = frozenset({"prompt", "target_new", "target_true", "relation_id"})


class Problem(NamedTuple):
    """One thing that is wrong with a record: the field as the file names it, and what to do."""

    field: str
    what: str


@dataclass(frozen=True)
class UnreadableRecord:
    """Stands for a record that could not be parsed."""

    what: str


@dataclass(frozen=True)
class Layout:
    """How the keys of a record become the fields of an `EditRequest`."""

    name: str

    to_fields: Callable[[Mapping[str, Any], int, list[Problem]], dict[str, Any]]
    """Maps (record, row) to unvalidated request fields; puts into the list what pydantic cannot
    see."""

    paths: Mapping[str, str] = field(default_factory=dict)
    """Where a request field stands in the record, where the two names differ."""


class Records(NamedTuple):
    """The parsed records of a file and their layout."""

    items: Sequence[object]
    layout: Layout


def to_row(item: object, row: int, source: str, layout: Layout) -> RequestRow:
    """Validate one parsed record; a record that is wrong gives a rejected row, never an error."""
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    if isinstance(item, UnreadableRecord):
        problems.append(Problem("", item.what))
    elif not isinstance(item, dict):
        problems.append(
            Problem("", f"is {kind(item)}, expected an object; see the format {layout.name}")
        )
    else:
        values = layout.to_fields(item, row, problems)
        if not problems:
            try:
                request = _validated(values)
            except ValidationError as error:
                problems = [_problem(detail, item, layout) for detail in error.errors()]
            else:
                return RequestRow.accept(row, source, request)
    reason = _reason(problems, row, source)
    return RequestRow(row, source, None, "rejected", reason, _stored(values, row))


def _validated(values: Mapping[str, Any]) -> EditRequest:
    """Validate a request, and hold it in half of the memory that pydantic takes for one.

    A job may hold a million. Pydantic gives each a dict of its own and the names of its given
    fields; attributes that are set one by one share the dict's keys, and most requests have the
    same fields. Prompts, objects and relations repeat from request to request.
    """
    made = EditRequest.model_validate(values)
    request = EditRequest.__new__(EditRequest)
    for name, value in made.__dict__.items():
        shared = sys.intern(value) if name in _REPEATED and isinstance(value, str) else value
        object.__setattr__(request, name, shared)
    given = made.model_fields_set
    object.__setattr__(
        request, "__pydantic_fields_set__", _GIVEN_FIELDS.setdefault(frozenset(given), given)
    )
    for name in ("__pydantic_extra__", "__pydantic_private__"):
        object.__setattr__(request, name, None)
    return request


def kind(value: object) -> str:
    """The type of a parsed value in the words of a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", bytes: "bytes"}
    names |= {list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def required_text(record: Mapping[str, Any], key: str, problems: list[Problem]) -> str | None:
    """The non-blank string under `key`; None, with its problem noted, when there is none."""
    value = record.get(key)
    if isinstance(value, str) and value.strip():
        return value
    if key not in record:
        problems.append(Problem(key, "is missing; add it"))
    elif isinstance(value, str):
        problems.append(Problem(key, "is blank; write it out"))
    else:
        problems.append(Problem(key, f"is {kind(value)}, expected a string; write it as text"))
    return None


def put_template(
    values: dict[str, Any], record: Mapping[str, Any], text_key: str, problems: list[Problem]
) -> None:
    """Fill `subject` and `prompt`: the first place of the subject in the text becomes `{}`."""
    subject = required_text(record, "subject", problems)
    text = required_text(record, text_key, problems)
    values["subject"], values["prompt"] = subject, text
    if subject is None or text is None:
        return
    if subject not in text:
        what = f"{quote(subject)} is not in {text_key}, {quote(text)}; write it as it stands there"
        problems.append(Problem("subject", what))
        return
    values["prompt"] = text.replace(subject, "{}", 1)
    if values["prompt"].count("{}") > 1:
        problems.append(Problem(text_key, "has {} beside the subject; remove it"))


def first_if_list(value: object) -> object:
    """The first of several acceptable answers, or the value itself when it is no list."""
    return value[0] if isinstance(value, list) and value else value


def as_list(value: object) -> object:
    """A string as a list of one; anything else as it is, for pydantic to judge."""
    return [value] if isinstance(value, str) else value


def case_name(value: object) -> object:
    """A whole number as its digits; anything else as it is, for pydantic to judge."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _stored(values: Mapping[str, Any], row: int) -> dict[str, str | None]:
    stored = {name: _storable(values.get(name)) for name in STORED_FIELDS}
    stored["case_id"] = stored["case_id"] or f"row-{row}"
    return stored


def _storable(value: object) -> str | None:
    """Text that Parquet can hold: lone surrogates become escapes, other types than text None."""
    value = case_name(value)
    if not isinstance(value, str):
        return None
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _reason(problems: Sequence[Problem], row: int, source: str) -> str:
    lines = []
    for name, what in problems[:LONGEST_REASON]:
        where = f", field {name}" if name else ""
        lines.append(f"{source}: row {row}{where}: {what}")
    if len(problems) > LONGEST_REASON:
        lines.append(f"{source}: row {row}: {len(problems) - LONGEST_REASON} more problems")
    return "\n".join(lines)


def _problem(detail: ErrorDetails, record: Mapping[str, Any], layout: Layout) -> Problem:
    return Problem(_source_field(detail["loc"], record, layout), _what(detail))


def _source_field(loc: tuple[str | int, ...], record: Mapping[str, Any], layout: Layout) -> str:
    """The field that pydantic means, as the record names it: `neighborhood_prompts[3]`."""
    known = ".".join(part for part in loc if isinstance(part, str))
    if known in layout.paths:
        path = layout.paths[known]
        value: Any = record
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        # A string that the layout made into a list of one has no position, nor has an empty list.
        positions = [part for part in loc if isinstance(part, int)]
        return path + "".join(
            f"[{i}]" for i in positions if isinstance(value, list) and i < len(value)
        )
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part if part.isidentifier() and len(part) <= 60 else quote(part)
            path += f".{name}" if path else name
    return path


def _what(detail: ErrorDetails) -> str:
    """What is wrong and what to do, in our words."""
    found = kind(detail["input"])
    match detail["type"]:
        case "value_error":
            return str(detail["ctx"]["error"])
        case "missing":
            return "is missing; add it"
        case "extra_forbidden":
            return "is not a field of a request; remove it or correct its name"
        case "string_too_short":
            return "is empty; write it out or leave it away"
        case "string_type":
            return f"is {found}, expected a string; write it as text"
        case "string_unicode":
            return "is not valid Unicode (a lone surrogate); write it as UTF-8"
        case "tuple_type":
            return f"is {found}, expected a list; put it in [ ]"
        case "model_type":
            return f"is {found}, expected an object with prompt and target; write it so"
        case _:
            return f"{detail['msg']}; correct it"
