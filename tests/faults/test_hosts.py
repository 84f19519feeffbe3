"""Several nodes that differ, come late, leave, are slow, or are cut off: no bit changes.

All are slow: minutes pass until nodes are up and processes have imported torch. A worker that finds
room late is in tests/cluster/test_ray_engine.py too, in seconds.
"""

import os
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pipeline.results.timings import Timing, read_timings
from tests.faults.harness import Trial
from tests.faults.hosts import Hosts, why_not
from tests.faults.job import Job, parts_written
from tests.faults.nodes import Actor, Nodes, kill
from tests.tiny_jobs import TinyJobs

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def long_job(tiny: TinyJobs) -> Job:
    """One whose values take long enough for something to happen meanwhile."""
    return Job(tiny, tiny.root / "long", shards=36, value={"steps": 100, "stop_loss": 0.0})


@contextmanager
def _nodes(count: int, memories: tuple[int, ...] = ()) -> Iterator[Nodes]:
    nodes = Nodes(count, memories)
    try:
        yield nodes
    finally:
        nodes.close()


def _workers(actors: list[Actor]) -> list[Actor]:
    """Workers that have started."""
    return [a for a in actors if a.kind == "EditWorker" and a.method != "__init__"]


def _calls(trial: Trial, method: str = "") -> list[Timing]:
    found = [timing for timing in read_timings(trial.output) if timing.call is not None]
    return [timing for timing in found if method in ("", timing.call)]


def _values_written(trial: Trial, count: int) -> bool:
    """Wait until so many shards of values are done; false where the driver has ended."""
    return trial.reach(lambda: parts_written(trial.output)["values"] >= count)


def _searching(trial: Trial, actors: Callable[[], list[Actor]]) -> Actor:
    """Wait for a worker that is searching values."""
    found: list[Actor] = []

    def is_there() -> bool:
        found[:] = [actor for actor in actors() if actor.method == "values"]
        return bool(found)

    assert trial.reach(is_there)
    return found[0]


def test_a_worker_is_not_put_where_its_memory_does_not_fit(long_job: Job, tmp_path: Path) -> None:
    """Of three nodes one is too small; the job goes on without it and says what is missing."""
    with _nodes(3, (1_000_000_000, 3_000_000_000, 3_000_000_000)) as nodes:
        settings = {"workers": 3, "memory_per_worker_gb": 2.0}
        trial = Trial(long_job, nodes, tmp_path / "run", cluster=settings)
        trial.start()
        assert _values_written(trial, 2)
        small = nodes.raylets()[0]
        found = [a.raylet for a in nodes.actors() if a.kind == "EditWorker"]
        assert len(found) == 2 and small not in found
        ended = trial.wait()
        assert trial.problems() == []
    asked = r"each asks for \{'num_cpus': 1, .*'memory': '2\.0 GB'\}, free are"
    enough = "2 of 4 nodes are large enough for one"
    assert re.search(rf"beginning with 2 of 3 workers.*{asked}.*{enough}", ended.log), ended.log
    assert {call.worker for call in _calls(trial, "values")} <= {0, 1, 2}
    assert len({call.worker for call in _calls(trial, "values")}) == 2


def test_work_flows_to_nodes_that_join_late(long_job: Job, tmp_path: Path) -> None:
    """One node of three is there at first; its worker is halted until the others have come."""
    with _nodes(1) as nodes:
        trial = Trial(long_job, nodes, tmp_path / "run", cluster={"workers": 3})
        trial.start()
        assert _values_written(trial, 2)
        (first,) = _workers(nodes.actors())
        os.kill(first.process, signal.SIGSTOP)
        kept = parts_written(trial.output)["values"]
        nodes.count = 3
        # The first one's shard is still out.
        assert _values_written(trial, long_job.shards - 1)
        kill(first.process, signal.SIGCONT)
        ended = trial.wait()
        assert trial.problems() == []
    assert "beginning with 1 of 3 workers" in ended.log
    calls = _calls(trial, "values")
    shares = Counter(call.worker for call in calls)
    assert len(shares) == 3 and shares.total() == long_job.shards
    early = min(calls, key=lambda call: call.start).worker
    assert shares[early] <= kept + 2


def test_a_node_that_leaves_is_not_waited_for(long_job: Job, tmp_path: Path) -> None:
    """No other comes in its place: its shards are done by the rest."""
    with _nodes(3) as nodes:
        trial = Trial(long_job, nodes, tmp_path / "run", cluster={"workers": 3})
        trial.start()
        assert _values_written(trial, 3)
        nodes.count = 2
        assert nodes.kill_node(_searching(trial, nodes.actors).raylet)
        ended = trial.wait()
        assert trial.problems() == []
    assert re.search(r"worker \d was lost .*starting it again", ended.log)
    calls = _calls(trial)
    (gone,) = {call.worker for call in calls if call.outcome == "lost"}
    assert {call.worker for call in calls if call.call == "evaluate" and call.round == 0} == (
        {0, 1, 2} - {gone}
    )


@contextmanager
def _slowed(process: int, share: float, period: float = 0.4) -> Iterator[None]:
    """Let a process run a share of the time only."""
    over = threading.Event()

    def halt() -> None:
        while not over.is_set():
            kill(process, signal.SIGSTOP)
            time.sleep(period * (1 - share))
            kill(process, signal.SIGCONT)
            time.sleep(period * share)

    thread = threading.Thread(target=halt)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_slow_node_gets_fewer_shards_and_keeps_nobody_waiting(
    long_job: Job, tmp_path: Path
) -> None:
    """Shards go to whoever is free: the others stay busy until none is left to give out."""
    with _nodes(3) as nodes:
        trial = Trial(long_job, nodes, tmp_path / "run", cluster={"workers": 3})
        trial.start()
        assert trial.reach(lambda: len(_workers(nodes.actors())) == 3)
        slow = _workers(nodes.actors())[0]
        with _slowed(slow.process, 0.15):
            trial.wait()
        assert trial.problems() == []
    calls = _calls(trial, "values")
    shares = Counter(call.worker for call in calls)
    (slowest, fewest), *_ = sorted(shares.items(), key=lambda item: item[1])
    others = [worker for worker in shares if worker != slowest]
    begun = min(call.start for call in calls)
    last_given = max(call.start for call in calls)
    idle = {
        worker: 1 - _busy(calls, worker, begun, last_given) / (last_given - begun)
        for worker in others
    }
    print(f"shards by worker: {dict(shares)}; idle shares of the others: {idle}")
    assert len(shares) == 3 and all(shares[worker] >= 2 * fewest for worker in others)
    assert all(share <= 0.2 for share in idle.values())


def _busy(calls: list[Timing], worker: int, begun: float, end: float) -> float:
    """Seconds between two moments that a worker had a call."""
    spans = [(c.start, min(c.start + c.seconds, end)) for c in calls if c.worker == worker]
    return sum(stop - max(start, begun) for start, stop in spans)


# --- a network of their own ---------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """A head and three hosts, with a cable each."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with ExitStack() as ended:
        # Sockets have short names.
        temporary = ended.enter_context(
            tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True)
        )
        (tmp_path / "home").mkdir()
        found = Hosts(tmp_path / "home", Path(temporary), ended, count=3)
        for name, value in found.cluster.environment.items():
            if name.startswith("RAY_"):
                monkeypatch.setenv(name, value)
        yield found


def test_a_host_that_is_cut_off_counts_as_lost(long_job: Job, tmp_path: Path, hosts: Hosts) -> None:
    """Its worker goes on and nobody hears of it; its shard is done elsewhere, to the same bits."""
    trial = Trial(long_job, hosts, tmp_path / "run", cluster={"workers": 3})
    trial.start()
    assert _values_written(trial, 3)
    host = hosts.host_of(_searching(trial, hosts.actors))
    assert host is not None
    hosts.cut(host)
    ended = trial.wait()
    hosts.mend(host)
    assert trial.problems() == []
    assert re.search(r"worker \d was lost .*starting it again", ended.log)
    calls = _calls(trial, "values")
    lost = [call for call in calls if call.outcome == "lost"]
    assert len(lost) == 1
    done = [call.shard for call in calls if call.outcome == "done"]
    assert sorted(done) == list(range(long_job.shards))


def test_a_cable_that_is_out_for_a_moment_costs_nothing(
    long_job: Job, tmp_path: Path, hosts: Hosts
) -> None:
    trial = Trial(long_job, hosts, tmp_path / "run", cluster={"workers": 3})
    trial.start()
    assert _values_written(trial, 3)
    hosts.cut(0)
    time.sleep(1.5)
    hosts.mend(0)
    trial.wait()
    assert trial.problems() == []
    assert [call.outcome for call in _calls(trial, "values")] == ["done"] * long_job.shards
