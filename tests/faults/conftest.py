"""Fixtures of the fault tests: one job with its undisturbed run, one cluster of several nodes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.faults.job import Job

if TYPE_CHECKING:
    from tests.faults.nodes import Nodes
    from tests.tiny_jobs import TinyJobs


@pytest.fixture(scope="session")
def job(tiny: "TinyJobs") -> Job:
    """The job that faults are tried on."""
    return Job(tiny, tiny.root / "faults")


@pytest.fixture(scope="session")
def all_nodes() -> Iterator["Nodes"]:
    """A cluster of a head and three nodes."""
    from tests.faults.nodes import Nodes

    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(all_nodes: "Nodes") -> "Nodes":
    """The cluster, with as many nodes alive as at first."""
    all_nodes.restore()
    return all_nodes
