"""What a measurement was made on, how it is printed, and where its row goes."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def describe_machine() -> dict[str, Any]:
    """Processor, threads, versions and commit (None outside a checkout)."""
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": model[0] if model else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # a copy of the files without git beside it
    return found.stdout.strip()


def report(benchmark: str, row: dict[str, Any], results: Path = RESULTS) -> None:
    """Print a benchmark's row as a table of two columns and append it to its results."""
    print_table(f"{benchmark}: results", ("what", "value"), list(row.items()))
    append_row(benchmark, {**describe_machine(), **row}, results)


def append_row(benchmark: str, row: dict[str, Any], results: Path = RESULTS) -> None:
    """Append one row to <results>/<benchmark>.parquet; new columns are added."""
    if find_spec("pyarrow") is None:
        # A GPU machine may have torch and transformers only: what it prints is then the record.
        print(f"pyarrow is not installed, no file is written; the row: {row}")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = results / f"{benchmark}.parquet"
    results.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([row])
    if path.exists():
        table = pa.concat_tables([pq.read_table(path), table], promote_options="permissive")
    pq.write_table(table, path)
    print(f"appended to {path}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under a title; without rich (a bare GPU machine) as lines with tabs."""
    cells = [[_cell(value) for value in row] for row in rows]
    if find_spec("rich") is None:
        print(title, "\t".join(columns), *("\t".join(row) for row in cells), sep="\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in cells:
        table.add_row(*row)
    # A pipe has no width of its own; cells cut short would be worth nothing.
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table)


def print_goals(goals: Mapping[str, tuple[float, str, float]]) -> None:
    """Print what must be reached: name -> (measured, ">=" or "<=", wanted)."""
    rows = []
    for name, (measured, relation, wanted) in goals.items():
        met = measured >= wanted if relation == ">=" else measured <= wanted
        rows.append((name, measured, f"{relation} {wanted:g}", "yes" if met else "NO"))
    print_table("must reach", ("what", "measured", "wanted", "met"), rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
