"""Reading a part whose bytes are as listed, but which may come from anyone: what it must hold."""

import hashlib
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.results.listing import Part, TableKind
from pipeline.results.place import LISTING
from pipeline.results.schemas import check_schema


def require_inside(path: Path, root: Path) -> Path:
    """Return the path of a part after checking that no link leads it out of the run directory.

    Raises:
        ValueError: one does.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError("is a link that leads out of the run directory")
    return path


def read_table(kind: TableKind | Literal["harness"], path: Path) -> pa.Table:
    """Read a part with the columns of its kind.

    Raises:
        ValueError: it is not Parquet, or a column is not as `schemas` has it.
    """
    try:
        table = pq.read_table(path, partitioning=None)
        check_schema(kind, table)
    except (TypeError, ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(f"is not one of our parts: {_one_line(error)}") from error
    return table


def problem_of(path: Path, part: Part) -> str | None:
    """What makes a file another than the part that was listed; None if nothing does."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != part.bytes:
        return f"has {size} bytes, expected {part.bytes}"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != part.sha256:
        return f"has SHA-256 {digest}, expected {part.sha256}"
    try:
        rows = None if part.rows is None else count_rows(path)
    except ValueError as error:
        return str(error)
    return None if rows == part.rows else f"has {rows} rows, {LISTING} says {part.rows}"


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, from its footer.

    Raises:
        ValueError: it has none.
    """
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"is not Parquet: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
