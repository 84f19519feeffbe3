"""Fixtures shared by all tests."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before the libraries that read it are imported: no test has anything to fetch.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tests.fuzzing  # noqa: F401 - registers its profile before hypothesis looks for it

if TYPE_CHECKING:
    from tests.tiny_jobs import TinyJobs


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real data and model; tests that need it skip when it is absent."""
    root = Path(os.environ.get("EDITFLEET_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "models" / "counterfact-12m").is_dir():
        pytest.skip(f"needs the shared data and model; {root} has none (set EDITFLEET_SHARED)")
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "TinyJobs":
    """Tiny models, a corpus and specs; what is computed for them is kept for the session."""
    # Here, since it imports torch, which many tests do without.
    from tests.tiny_jobs import TinyJobs

    return TinyJobs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray on this machine for all tests: the engine joins it instead of starting its own."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()
