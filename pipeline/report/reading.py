"""Reading just the columns that a report needs of a run that may come from anyone."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ResultsDamagedError
from pipeline.results.listing import TableKind
from pipeline.results.reading import Run


def read_columns(
    run: Run, kind: TableKind, columns: list[str], chosen: pc.Expression | None = None
) -> pa.Table:
    """Scan some columns of a table, and only the rows that are chosen.

    Raises:
        ResultsDamagedError: a part is missing, damaged or has other columns.
    """
    try:
        table: pa.Table = run.dataset(kind).to_table(columns=columns, filter=chosen)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ResultsDamagedError(
            f"{run.place}: {kind}/ cannot be read: {' '.join(str(error).split())};"
            f" `editfleet status {run.place} --verify` names the damaged files"
        ) from error
    return table


def flattened(settings: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names with their values as text, for a table."""
    if isinstance(settings, dict) and settings:
        found: dict[str, str] = {}
        for name, value in settings.items():
            found |= flattened(value, f"{prefix}.{name}" if prefix else str(name))
        return found
    if isinstance(settings, list):
        return {prefix: ", ".join(str(item) for item in settings) or "none"}
    return {prefix: "null" if settings is None else str(settings)}
