"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real data and model; tests that need it skip when it is absent."""
    root = Path(
        os.environ.get("EDITFLEET_SHARED", Path(__file__).resolve().parents[2] / "shared")
    )
    if not (root / "models" / "counterfact-12m").is_dir():
        pytest.skip(f"needs the shared data and model; {root} has none (set EDITFLEET_SHARED)")
    return root
