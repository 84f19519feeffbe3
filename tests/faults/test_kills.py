"""Processes and nodes that die at exact moments, on a cluster of several nodes: no bit changes.

All are slow: minutes pass until the cluster holds a node for dead and processes are back. Deaths
right after a call was sent are in tests/cluster/test_ray_engine.py, signals to the command in
tests/test_cli.py, deaths at random moments in `python -m tests.faults.run`.
"""

from pathlib import Path

import pytest

from tests.faults.driver import Death
from tests.faults.harness import Trial, until_complete
from tests.faults.job import PHASES, Job
from tests.faults.nodes import Nodes

# Restarted processes import torch; a busy machine takes a minute for that.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def _undergo(job: Job, nodes: Nodes, folder: Path, *deaths: Death) -> Trial:
    """Let a run die these deaths, and check that it did and is whole."""
    trial = Trial(job, nodes, folder / "run", deaths)
    drivers = until_complete(trial)
    assert [death for death in deaths if not Path(death.mark).exists()] == []
    assert trial.problems() == []
    assert drivers == 1 + sum(death.victim == "driver" for death in deaths)
    return trial


@pytest.mark.slow
def test_a_node_dies_with_its_keys_and_a_worker_while_applying(
    job: Job, nodes: Nodes, tmp_path: Path
) -> None:
    """Keys are gone that the reducer was to be sent; an update is applied and never answered."""
    _undergo(
        job,
        nodes,
        tmp_path,
        Death(str(tmp_path / "1"), "keys", "add", number=16),
        Death(str(tmp_path / "2"), "worker", "apply", "answer", version=1),
    )


@pytest.mark.slow
def test_everything_dies_once(job: Job, nodes: Nodes, tmp_path: Path) -> None:
    """In one run: at the start, with keys, between receiving and answering, while applying."""
    _undergo(
        job,
        nodes,
        tmp_path,
        Death(str(tmp_path / "0"), "worker", "describe", "answer"),
        Death(str(tmp_path / "1"), "worker", "values", "answer", number=2),
        Death(str(tmp_path / "2"), "reducer", "add", "answer", number=5),
        Death(str(tmp_path / "3"), "keys", "add", number=16),
        Death(str(tmp_path / "4"), "worker", "apply", "answer", version=0),
        Death(str(tmp_path / "5"), "node", "evaluate", "entry", number=1, version=2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "node"])
@pytest.mark.parametrize("moment", ["entry", "answer"])
@pytest.mark.parametrize(
    ("method", "version"),
    [
        ("describe", None),
        ("covariance", None),
        ("values", 0),
        ("read_keys", 1),
        ("apply", 1),
        ("evaluate", 2),
    ],
)
def test_a_worker_or_its_node_dies(
    job: Job,
    nodes: Nodes,
    tmp_path: Path,
    victim: str,
    method: str,
    moment: str,
    version: int | None,
) -> None:
    number = 0 if method in ("describe", "covariance", "apply") else 1
    death = Death(str(tmp_path / "mark"), victim, method, moment, number, version)  # type: ignore
    _undergo(job, nodes, tmp_path, death)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "moment", "number"),
    [("begin", "answer", 1), ("add", "answer", 14), ("solve", "entry", 0), ("solve", "answer", 1)],
)
def test_the_reducer_dies(
    job: Job, nodes: Nodes, tmp_path: Path, method: str, moment: str, number: int
) -> None:
    """Between receiving and answering; numbers from the second layer on where there are such."""
    death = Death(str(tmp_path / "mark"), "reducer", method, moment, number)  # type: ignore
    _undergo(job, nodes, tmp_path, death)


@pytest.mark.slow
def test_the_driver_dies_at_the_end_of_every_phase(job: Job, nodes: Nodes, tmp_path: Path) -> None:
    """Seven drivers for one run; each goes on where the one before died."""
    phases = PHASES[: PHASES.index("finish")]
    deaths = [Death(str(tmp_path / phase), "driver", phase) for phase in phases]
    trial = _undergo(job, nodes, tmp_path, *deaths)
    assert [end.code for end in trial.ends] == [-9] * len(phases) + [2]
