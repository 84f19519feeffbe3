"""Ray: the same bits as one process, whatever dies meanwhile. Processes are killed for real."""

import logging
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from pipeline import run_batch_edit, run_comparison, run_sequential
from pipeline.cluster import ray_engine, roster, tree
from pipeline.cluster.engine import Call, WorkerLostError
from pipeline.cluster.plan import make_plan
from pipeline.cluster.ray_engine import RayEngine
from pipeline.cluster.ray_hosts import RayGuest, RayHosts
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.shards import Shard
from pipeline.cluster.waiting import Waiter
from pipeline.editing.update import Update
from pipeline.errors import InputError, JobFailedError, WeightVersionMismatchError
from pipeline.results import Run, read
from pipeline.results.timings import read_timings
from pipeline.results.updates import read_update
from pipeline.spec import ClusterSpec, JobSpec
from pipeline.spec.variants import variants
from tests.cases import relative_error
from tests.tiny_jobs import CONTEXTS, TinyJobs, digests, records

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

REQUESTS = records(72)  # more edits than a key has entries, in eight shards
CHANGES = ("cluster.shard_size=10", "evaluation.probes=[rewrite, neighborhood]")
ON_RAY = ("cluster.engine=ray",)


def _on_ray(tiny: TinyJobs, output: Path, *changes: str) -> JobSpec:
    return tiny.spec(output, *CHANGES, *ON_RAY, *changes, requests=REQUESTS)


def _in_process(tiny: TinyJobs) -> Run:
    return tiny.finished(*CHANGES, requests=REQUESTS)


def _pid(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _self: os.getpid()))


class Saboteur(RayEngine):
    """Kills the process that a call goes to, right after the call was sent.

    `plan` maps a method to the numbers of its calls, from 0, that are met with a kill.
    """

    plan: dict[str, set[int]]
    made: "list[Saboteur]"

    def __init__(self, spec: JobSpec) -> None:
        self.seen: Counter[str] = Counter()
        self.killed: Counter[str] = Counter()
        self.restarts = 0
        super().__init__(spec)
        self.made.append(self)

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        victim = self._victim(method, self._workers[worker])
        call = super().submit(worker, method, *args, **kwargs)
        self._kill(method, victim)
        return call

    def reduce(self, method: str, *args: Any) -> Any:
        self._kill(method, self._victim(method, self._reducer))
        return super().reduce(method, *args)

    def restart(self, worker: int) -> None:
        self.restarts += 1
        super().restart(worker)

    def _victim(self, method: str, actor: Any) -> int | None:
        number = self.seen[method]
        self.seen[method] += 1
        return _pid(actor) if number in self.plan.get(method, ()) else None

    def _kill(self, method: str, pid: int | None) -> None:
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.killed[method] += 1


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> type[Saboteur]:
    """The engine that jobs of this test get; set its plan."""
    monkeypatch.setattr(Saboteur, "plan", {}, raising=False)
    monkeypatch.setattr(Saboteur, "made", [], raising=False)
    monkeypatch.setattr("pipeline.cluster.ray_engine.RayEngine", Saboteur)
    return Saboteur


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_whose_worker_dies_between_rounds_gives_the_same_bits(
    tiny: TinyJobs, tmp_path: Path, sabotage: type[Saboteur]
) -> None:
    """The new worker takes the updates of the rounds before from disk, to the same version."""
    changes = [
        "method.name=memit_accumulated",
        "rounds={size: 4, evaluate_every: 2}",
        "evaluation.baseline=false",
        "evaluation.probes=[rewrite]",
    ]
    expected = read(run_sequential(tiny.spec(tmp_path / "plain", *changes)).path)
    sabotage.plan = {"values": {4}, "read_keys": {5}}
    spec = tiny.spec(tmp_path / "ray", *changes, *ON_RAY, "cluster.workers=2")
    assert digests(read(run_sequential(spec).path)) == digests(expected)
    assert sabotage.made[0].killed == {"values": 1, "read_keys": 1}


def test_studies_on_shared_workers_of_which_one_dies_have_the_bits_of_each_alone(
    tiny: TinyJobs, tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every study brings its own weights on the new worker up to date; it is replaced once."""
    changes = [
        "rounds={size: 6, evaluate_every: 2}",
        "compare.methods=[{name: memit}, {name: memit_accumulated}]",
        "evaluation.probes=[rewrite]",
    ]
    expected = [
        digests(read(run_sequential(study.at(tmp_path / "alone" / study.name)).path))
        for study in variants(tiny.spec(tmp_path, *changes))
    ]
    renewed: list[int] = []
    submit, new_worker = RayGuest.submit, RayHosts._new_worker

    def sent(guest: RayGuest, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        is_due = method == "values" and kwargs["version"] == 2 and len(renewed) == 2
        victim = _pid(guest._workers[worker]) if is_due else None
        call = submit(guest, worker, method, *args, **kwargs)
        if victim is not None and len(renewed) == 2:
            os.kill(victim, signal.SIGKILL)
        return call

    def made(hosts: RayHosts) -> Any:
        renewed.append(1)
        return new_worker(hosts)

    monkeypatch.setattr(RayGuest, "submit", sent)
    monkeypatch.setattr(RayHosts, "_new_worker", made)
    spec = tiny.spec(tmp_path / "ray", *changes, *ON_RAY, "cluster.workers=2")
    found = [digests(read(result.path)) for result in run_comparison(spec)]
    assert repr(found) == repr(expected)
    assert 3 <= len(renewed) <= 5, "two at the start and at least one in the place of a dead one"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_workers_gives_the_bits_of_one_process(
    tiny: TinyJobs, tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    spec = _on_ray(
        tiny, tmp_path / "run", f"cluster.workers={workers}", "cluster.stall_seconds=0.001"
    )
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        run = read(run_batch_edit(spec).path)
    assert digests(run) == digests(_in_process(tiny))
    assert run.manifest["workers"]["count"] == workers
    assert len(run.manifest["peak_worker_memory_bytes"]) == workers
    assert ray.is_initialized(), "a cluster that was there before stays"
    # A thousandth of a second is soon over: what is still out is named.
    assert re.search(r"values: no answer yet from .*shard \d+ on worker 0 for \d+ s", caplog.text)


@pytest.mark.slow
def test_sums_of_very_many_edits_travel_in_a_tree(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tree for small numbers: the bits of one process, and the same sums to rounding."""
    combined: list[Any] = []
    combine = RayEngine.combine

    def watched(engine: RayEngine, function: Any, references: Any) -> Any:
        combined.append((function, len(references)))
        return combine(engine, function, references)

    monkeypatch.setattr(RayEngine, "combine", watched)
    monkeypatch.setattr(tree, "edits_for_sums", lambda _key_size: 16)
    monkeypatch.setattr(tree, "FAN_IN", 2)
    here = read(run_batch_edit(tiny.spec(tmp_path / "a", *CHANGES, requests=REQUESTS)).path)
    on_ray = read(run_batch_edit(_on_ray(tiny, tmp_path / "b")).path)
    # Seven shards of ten requests and one of two: two pairs, and all that is left.
    a_layer = [(tree.sum_keys, 2), (tree.sum_keys, 2), (tree.sum_keys, 4), (tree.add_up, 2)]
    assert combined == a_layer * 2
    assert digests(on_ray)["updates"] == digests(here)["updates"]
    for summed, plain in zip(here.updates(), _in_process(tiny).updates(), strict=True):
        one, other = (read_update(path)[1].matrix() for path in (summed, plain))
        assert relative_error(one, other) < 1e-5


def test_relative_paths_are_the_driver_s(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a cluster that was started elsewhere have another working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny.model())
    changes = ["model.path=./model", "output.path=runs/mine", "output.save_model=true"]
    changes += ["cluster.workers=1", "evaluation.probes=[]"]
    result = run_batch_edit(_on_ray(tiny, tmp_path, *changes))
    assert (tmp_path / "runs" / "mine" / "model" / "model.safetensors").is_file()
    assert digests(read(result.path))["updates"] == digests(_in_process(tiny))["updates"]


# --- deaths -------------------------------------------------------------------------------------

_DEATHS: dict[str, dict[str, set[int]]] = {
    "values": {"values": {2}},
    "read_keys": {"read_keys": {11}},  # in the second layer, when the first one is edited
    "evaluate": {"evaluate": {1}},
    "add": {"add": {10}},
}
_ALL_DEATHS = {method: numbers for death in _DEATHS.values() for method, numbers in death.items()}


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(_ALL_DEATHS, id="all"),
        *(pytest.param(plan, id=name, marks=pytest.mark.slow) for name, plan in _DEATHS.items()),
    ],
)
def test_killed_processes_change_no_bit(
    tiny: TinyJobs, tmp_path: Path, sabotage: type[Saboteur], plan: dict[str, set[int]]
) -> None:
    sabotage.plan = plan
    run = read(run_batch_edit(_on_ray(tiny, tmp_path / "run", "cluster.workers=2")).path)
    (engine,) = sabotage.made
    assert engine.killed == {method: len(numbers) for method, numbers in plan.items()}
    assert engine.restarts >= sum(method != "add" for method in plan)
    assert digests(run) == digests(_in_process(tiny))
    run.verify()
    assert Counter(run.edits()["case_id"].to_pylist()) == {str(n): 1 for n in range(72)}
    metrics = run.metrics()
    keys = zip(
        *(metrics[name].to_pylist() for name in ("round", "case_id", "probe", "probe_index")),
        strict=True,
    )
    assert len(set(keys)) == len(metrics) == 2 * 72 * 3


def test_a_worker_that_always_dies_ends_the_job(
    tiny: TinyJobs, tmp_path: Path, sabotage: type[Saboteur]
) -> None:
    sabotage.plan = {"values": set(range(1, 100))}
    spec = _on_ray(tiny, tmp_path / "run", "cluster.workers=1", "cluster.max_retries=1")
    with pytest.raises(JobFailedError, match=r"shard 1 was lost 2 times.*finished parts are kept"):
        run_batch_edit(spec)
    assert sabotage.made[0].killed["values"] == 2
    run = read(tmp_path / "run")
    assert run.manifest["status"] == "failed" and not run.updates()
    assert "shard 1 was lost" in run.manifest["stopped"]["reason"]
    assert len(run.files("values")) == 1 and run.values().num_rows == 10
    expected = {row["case_id"]: row["z"] for row in _in_process(tiny).values().to_pylist()}
    assert all(expected[row["case_id"]] == row["z"] for row in run.values().to_pylist())


def test_a_reducer_that_always_dies_ends_the_job(
    tiny: TinyJobs, tmp_path: Path, sabotage: type[Saboteur]
) -> None:
    sabotage.plan = {"solve": set(range(100))}
    changes = ["cluster.workers=1", "cluster.max_retries=1", "evaluation.probes=[]"]
    with pytest.raises(JobFailedError, match=r"layer 0: the reducer keeps dying"):
        run_batch_edit(_on_ray(tiny, tmp_path / "run", *changes))
    assert sabotage.made[0].killed["solve"] == 2 and not read(tmp_path / "run").updates()


# --- workers that come late -----------------------------------------------------------------------


@pytest.fixture
def occupied() -> Iterator[Any]:
    """An actor that leaves one processor of four to others, until it is killed."""
    actor = ray.remote(num_cpus=3)(Occupant).remote()
    ray.get(actor.is_there.remote())
    yield actor
    ray.kill(actor)


class Occupant:
    """Takes up processors."""

    def is_there(self) -> bool:
        """Whether it has started."""
        return True


def test_a_worker_that_finds_room_late_takes_shards(
    tiny: TinyJobs,
    tmp_path: Path,
    occupied: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The job begins with the one that fits, says what the other lacks, and waits for nobody."""
    monkeypatch.setattr(ray_engine, "_START_SECONDS", 1.0)
    monkeypatch.setattr(roster, "_SAY_SECONDS", 0.5)
    submit, applied = RayEngine.submit, [0]

    def sent(engine: RayEngine, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        applied[0] += method == "apply"
        call = submit(engine, worker, method, *args, **kwargs)
        # Between two layers: the late one has an update to catch up with, and keys to read.
        if method == "read_keys" and applied == [1]:
            ray.kill(occupied)
            late = next(iter(engine.late))
            ray.get(submit(engine, late, "describe").handle)
            applied[0] += 1
        return call

    monkeypatch.setattr(RayEngine, "submit", sent)
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        run = read(run_batch_edit(_on_ray(tiny, tmp_path / "run", "cluster.workers=2")).path)
    assert digests(run) == digests(_in_process(tiny))
    assert re.search(
        r"beginning with 1 of 2 workers.*; each asks for \{'num_cpus': 1.*\}, free are \{",
        caplog.text,
    )
    calls = [timing for timing in read_timings(run.path) if timing.call is not None]
    of_worker = {(timing.call, timing.worker) for timing in calls}
    assert {("values", 0), ("read_keys", 1)} <= of_worker
    assert ("values", 1) not in of_worker


def test_room_is_counted_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processors on each of two nodes have room for two workers of two, not for three."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0, "memory": 7e9}},
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0, "memory": 2e9}},
        {"Alive": True, "Resources": {"memory": 9e9}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0, "memory": 9e12}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)

    def room(**settings: Any) -> int:
        cluster = ClusterSpec(**{"gpus_per_worker": 0, **settings})
        return ray_engine._num_workers(cluster, ray_engine._actor_options(cluster))

    assert room() == 6
    assert room(cpus_per_worker=2) == 2
    assert room(gpus_per_worker=0.1, cpus_per_worker=1) == 6
    assert room(gpus_per_worker=0.4) == 4
    assert room(memory_per_worker_gb=2.5) == 2
    assert room(memory_per_worker_gb=2.0) == 4
    assert room(memory_per_worker_gb=100) == 1  # it will be waited for
    assert room(workers=5, memory_per_worker_gb=100) == 5


# --- the engine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny: TinyJobs, local_ray: None) -> Iterator[RayEngine]:
    spec = tiny.spec(tiny.root / "unused", *ON_RAY, "cluster.workers=1")
    engine = RayEngine(make_plan(spec).spec)
    yield engine
    engine.close()


@pytest.fixture
def scheduler(engine: RayEngine) -> Iterator[Scheduler]:
    scheduler = Scheduler(engine, max_retries=1, stall_seconds=60)
    scheduler.set_contexts(tuple(CONTEXTS))
    yield scheduler
    if scheduler.version:  # the next test gets an unedited worker
        engine.restart(0)


def test_errors_of_ours_come_back_as_they_were_raised(scheduler: Scheduler) -> None:
    with pytest.raises(WeightVersionMismatchError, match="holds 0 updates, 4 are expected"):
        scheduler.call("save_model", "/nowhere", version=4)
    (outcome,) = scheduler.run("covariance", [Shard(0, ("a house", 17))], lambda _, i: (i, None))
    assert [item for item, _ in outcome.failures] == [17]
    assert outcome.survivors == ("a house",)


def test_a_killed_worker_comes_back_at_the_version_of_the_others(
    engine: RayEngine, scheduler: Scheduler
) -> None:
    generator = torch.Generator().manual_seed(0)
    update = Update.of(torch.randn(32, 64, generator=generator))
    scheduler.apply(0, update)
    scheduler.apply(1, update)
    before = scheduler.call("describe").process
    os.kill(before, signal.SIGKILL)
    with pytest.raises(WorkerLostError):
        while True:  # until Ray has seen it
            engine.result(engine.submit(0, "describe"))
    assert scheduler.call("apply", 1, update, version=1) == 2  # it has been applied already
    assert scheduler.call("describe").process != before


def test_a_worker_that_gives_no_answer_is_replaced(
    engine: RayEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that is stopped, not dead: Ray alone would wait for it for ever."""
    before = engine.result(engine.submit(0, "describe")).process
    os.kill(before, signal.SIGSTOP)
    call = engine.submit(0, "describe")
    with pytest.raises(WorkerLostError, match=r"no answer for \d+ s, longer than cluster"):
        Waiter(engine, 0.5, 1.5).result(call, "describe")
    assert re.search(r"no answer yet from describe on worker 0 for \d+ s", caplog.text)
    engine.restart(0)
    assert engine.result(engine.submit(0, "describe")).process != before


def test_a_worker_that_cannot_start_is_the_input_s_fault(tiny: TinyJobs, tmp_path: Path) -> None:
    shutil.copytree(tiny.model(), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    spec = _on_ray(tiny, tmp_path / "run", "cluster.workers=1", f"model.path={tmp_path / 'model'}")
    with pytest.raises(InputError, match=r"^model\.path: cannot load .*safetensors") as caught:
        run_batch_edit(spec)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_no_actor_is_left_behind(engine: RayEngine) -> None:
    """All jobs of this file before this one have ended, in one way or the other."""
    engine.result(engine.submit(0, "describe"))  # an earlier test may have replaced it just now
    alive = ray._private.state.state.actor_table(None)
    classes = Counter(
        actor["ActorClassName"] for actor in alive.values() if actor["State"] == "ALIVE"
    )
    assert classes == {"EditWorker": 1, "Reducer": 1}
