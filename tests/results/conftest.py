"""A run directory to write into, and rows for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.results import RunStore

Rows = list[dict[str, Any]]


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore.create(tmp_path / "run", {"name": "test", "status": "running"})


@pytest.fixture(scope="session")
def metric_rows() -> Callable[..., Rows]:
    def make(round: int, shard: int, count: int = 3) -> Rows:
        return [
            {
                "round": round,
                "edit_round": max(round, 0),
                "case_id": f"{shard}-{index}",
                "probe": "rewrite",
                "probe_index": index,
                "prompt": "Łódź lies in",
                "target_new": " Peru",
                "target_true": None,
                "nll_new": 0.25 * index,
                "nll_true": float("nan"),
                "success": index % 2 == 0,
                "exact": None,
            }
            for index in range(count)
        ]

    return make
