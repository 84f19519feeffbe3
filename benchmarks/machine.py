"""What a measurement was made on, and where its row goes."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers

ROOT = Path(__file__).parents[1]


def describe_machine() -> dict[str, Any]:
    """Processor, threads, versions and commit."""
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": model[0] if model else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }


def append_row(benchmark: str, row: dict[str, Any]) -> None:
    """Append one row to benchmarks/results/<benchmark>.parquet; new columns are added."""
    path = ROOT / "benchmarks" / "results" / f"{benchmark}.parquet"
    path.parent.mkdir(exist_ok=True)
    table = pa.Table.from_pylist([row])
    if path.exists():
        table = pa.concat_tables([pq.read_table(path), table], promote_options="permissive")
    pq.write_table(table, path)
