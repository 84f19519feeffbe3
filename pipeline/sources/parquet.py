"""Our own columns as Parquet; a null cell is a field left away."""

import difflib
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.requests import EditRequest
from pipeline.sources.files import writing
from pipeline.sources.jsonl import LAYOUT
from pipeline.sources.records import Records

_PROBE_FIELDS = ("prompt", "target", "aspect", "target_true")
_ROWS_AT_ONCE = 1024
_PROBES = pa.list_(pa.struct([(name, pa.string()) for name in _PROBE_FIELDS]))
_PROMPTS = pa.list_(pa.string())

SCHEMA = pa.schema(
    [
        pa.field("case_id", pa.string(), nullable=False),
        pa.field("subject", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("target_new", pa.string(), nullable=False),
        ("target_true", pa.string()),
        ("relation_id", pa.string()),
        ("paraphrase_prompts", _PROMPTS),
        ("neighborhood_prompts", _PROMPTS),
        ("locality", _PROBES),
        ("portability", _PROBES),
        ("generation_prompts", _PROMPTS),
    ]
)
"""The columns of a request file; all but the first four may be absent."""


def read(path: str) -> Records:
    """Read a Parquet file with our own columns.

    Raises:
        InputError: the file cannot be read, a needed column is missing or one is not ours.
    """
    table = read_table(path)
    check_columns(table.column_names, path)
    return Records(to_records(table, path), LAYOUT)


def read_table(path: str) -> pa.Table:
    """The whole file as one Arrow table.

    Raises:
        InputError: there is no such file or it is not Parquet.
    """
    try:
        # ParquetFile and not read_table: the path names one file, no partitioned data set.
        with pq.ParquetFile(path) as file:
            return file.read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read as Parquet: {_first_line(error)}; correct the file or the path"
        ) from None


def check_columns(names: Sequence[str], path: str) -> None:
    """Refuse a table that lacks a needed column or has one that is not ours.

    Raises:
        InputError: so it is; the message names the column.
    """
    for field in SCHEMA:
        if not field.nullable and field.name not in names:
            raise InputError(
                f"{path}: has no column {field.name}; its columns are {', '.join(names)}"
            )
    for name in names:
        if name not in SCHEMA.names:
            near = difflib.get_close_matches(name, SCHEMA.names, n=1)
            advice = f"did you mean {near[0]}?" if near else "remove it"
            raise InputError(f"{path}: column {name!r} is not a field of a request; {advice}")


def to_records(table: pa.Table, path: str) -> Sequence[object]:
    """The rows of a table as dicts without their null cells, made when they are asked for.

    Raises:
        InputError: there are no rows, or a cell is not valid UTF-8.
    """
    if not table.num_rows:
        raise InputError(f"{path}: holds no records; give at least one request")
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as error:
        found = _undecodable_cell(table, path) or f"{path}: {_first_line(error)}; write it anew"
        raise InputError(found) from None
    return _Rows(table)


class _Rows(Sequence[object]):
    """A table's rows as Python objects; of a million, only some are there at a time."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._start = 0
        self._made: list[object] = []

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int) -> object:  # type: ignore[override]
        if not 0 <= row - self._start < len(self._made):
            # Whoever reads on gets many at once; a shuffled reader needs each one alone.
            reads_on = row == self._start + len(self._made)
            rows = self._table.slice(row, _ROWS_AT_ONCE if reads_on else 1).to_pylist()
            self._start = row
            self._made = [
                {key: value for key, value in found.items() if value is not None} for found in rows
            ]
        return self._made[row - self._start]


def write_requests(rows: Iterable[EditRequest], path: str) -> None:
    """Write requests as one Parquet file with the columns of `SCHEMA`.

    Raises:
        InputError: the file cannot be written.
    """
    table = pa.Table.from_pylist([request.model_dump() for request in rows], schema=SCHEMA)
    with writing(path):
        pq.write_table(table, path)


def _undecodable_cell(table: pa.Table, path: str) -> str | None:
    """Say which cell of the table cannot be decoded; slow, so only asked when there is one."""
    for name in table.column_names:
        for row, cell in enumerate(table[name]):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                return (
                    f"{path}: row {row}, field {name}: not valid UTF-8 at byte {error.start} "
                    "of the cell; write it as UTF-8"
                )
    return None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
