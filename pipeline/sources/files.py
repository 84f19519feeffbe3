"""Request files as parsed JSON; what cannot be read at all is an `InputError`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import InputError
from pipeline.sources.records import UnreadableRecord, kind


def read_text(path: str) -> str:
    """The file's text, without a byte order mark.

    Raises:
        InputError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; correct requests.path") from None
    except IsADirectoryError:
        raise InputError(
            f"{path}: is a directory; name a file, or set requests.format to dataset"
        ) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{path}: not valid UTF-8 at byte {error.start} (0x{byte:02x}); save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise InputError(f"{path!r}: cannot be read: {error}; correct requests.path") from None


def load_json_list(path: str) -> list[object]:
    """The records of a file that holds one JSON list.

    Raises:
        InputError: it is not JSON (with line and column), not a list, or empty.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {_not_json(error)}; correct the file") from None
    if not isinstance(content, list):
        raise InputError(f"{path}: holds {kind(content)}, expected a list; put the records in [ ]")
    return _at_least_one(content, path)


def load_json_lines(path: str) -> list[object]:
    """The records of a file with one JSON object a line; blank lines are no records.

    Lines end at a line feed only, since the other line breaks of Unicode may stand in a JSON
    string. A line that is not JSON becomes an `UnreadableRecord`.

    Raises:
        InputError: there is no record, or no line at all holds a JSON object.
    """
    records: list[object] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip(" \t\r"):
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                records.append(
                    UnreadableRecord(f"{_not_json(error, number)}; correct or remove the line")
                )
    if records and not any(isinstance(record, dict) for record in records):
        first = records[0]
        what = first.what if isinstance(first, UnreadableRecord) else f"holds {kind(first)}"
        raise InputError(f"{path}: no line is a JSON object; line 1 of the records: {what}")
    return _at_least_one(records, path)


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn the errors of writing to `path` into an `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _at_least_one(records: list[object], path: str) -> list[object]:
    if not records:
        raise InputError(f"{path}: holds no records; give at least one request")
    return records


def _not_json(error: Exception, line: int | None = None) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON at line {line or error.lineno}, column {error.colno}: {error.msg}"
    where = "" if line is None else f" at line {line}"
    if isinstance(error, RecursionError):
        return f"not readable as JSON{where}: nested too deeply"
    return f"not readable as JSON{where}: {error}"
