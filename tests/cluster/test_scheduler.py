"""The scheduler over a real worker in this process: versions, losses at every call, blame."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import run_batch_edit
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.engine import Call, InProcessEngine, WorkerLostError
from pipeline.cluster.plan import make_plan, probe_shards
from pipeline.cluster.scheduler import Ended, Scheduler
from pipeline.cluster.shards import Shard
from pipeline.editing.update import Update
from pipeline.errors import InputError, JobFailedError, WeightVersionMismatchError
from pipeline.results import read
from pipeline.spec import JobSpec
from tests.tiny_jobs import CONTEXTS, TinyJobs, digests, records

RETRIES = 2


class LossyEngine(InProcessEngine):
    """Loses its worker at chosen calls, counted from 0, before or after the work is done."""

    def __init__(self, spec: JobSpec, lost: set[int], *, after_work: bool = False) -> None:
        super().__init__(spec)
        self.lost, self.after_work, self.calls, self.restarts = lost, after_work, 0, 0

    def result(self, call: Call) -> Any:
        number, self.calls = self.calls, self.calls + 1
        if number not in self.lost:
            return super().result(call)
        if self.after_work:
            super().result(call)
        raise WorkerLostError(f"call {number} is lost")

    def restart(self, worker: int) -> None:
        self.restarts += 1
        super().restart(worker)


@pytest.fixture(scope="module")
def spec(tiny: TinyJobs) -> JobSpec:
    """Six requests in two shards, without a baseline: a job of few calls."""
    tiny.finished("evaluation.baseline=false", requests=records(6))  # has the covariances ready
    return tiny.spec(tiny.root / "unused", "evaluation.baseline=false", requests=records(6))


@pytest.fixture
def scheduler(spec: JobSpec) -> Scheduler:
    return _scheduler(InProcessEngine(spec))


def _scheduler(engine: InProcessEngine) -> Scheduler:
    scheduler = Scheduler(engine, RETRIES, stall_seconds=60)
    scheduler.set_contexts(tuple(CONTEXTS))
    return scheduler


@pytest.fixture(scope="module")
def shards(spec: JobSpec) -> list[Shard]:
    return make_plan(spec).shards


@pytest.fixture(scope="module")
def probes(shards: list[Shard]) -> list[Shard]:
    """The rewrite and neighbourhood probes, five a shard."""
    (whole,) = probe_shards(shards, ["rewrite", "neighborhood"])
    return cut_shards(whole.items, 5)


def _asked(_: Shard, items: tuple[Any, ...]) -> tuple[Any, ...]:
    """What `evaluate` takes: probes and the rounds of their edits."""
    return items, [0] * len(items)


def _update(size: float) -> Update:
    generator = torch.Generator().manual_seed(0)
    return Update.of(size * torch.randn(32, 64, generator=generator))


# --- versions -----------------------------------------------------------------------------------


def test_a_worker_refuses_another_version(
    scheduler: Scheduler, shards: list[Shard], probes: list[Shard]
) -> None:
    items = shards[0].items
    values = torch.zeros(len(items), 32)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("values", (items,), {"round": 0}),
        ("read_keys", (0, items, values, 0), {}),
        ("evaluate", (probes[0].items, [0] * 5), {"round": 0}),
        ("save_model", ("/nowhere",), {}),
    ]
    for method, args, kwargs in calls:
        with pytest.raises(WeightVersionMismatchError, match="holds 0 updates, 1 are expected"):
            scheduler.call(method, *args, version=1, **kwargs)
    scheduler.apply(0, _update(0.1))
    for method, args, kwargs in calls:
        with pytest.raises(WeightVersionMismatchError, match="holds 1 updates, 0 are expected"):
            scheduler.call(method, *args, version=0, **kwargs)
    for method, args in (("covariance", (["The house."], None)), ("generate_contexts", ())):
        with pytest.raises(WeightVersionMismatchError, match="holds 1 updates"):
            scheduler.call(method, *args)


def test_a_wrong_version_is_no_request_s_fault(scheduler: Scheduler, shards: list[Shard]) -> None:
    """It must end the job, not be written down as the failure of every request."""
    settings: dict[str, Any] = {"version": 3, "round": 0}
    with pytest.raises(WeightVersionMismatchError):
        list(scheduler.run("values", shards, lambda _, items: (items,), **settings))


def test_applying_an_update_again_changes_nothing(scheduler: Scheduler) -> None:
    scheduler.apply(0, _update(0.1))
    worker = scheduler.engine._worker  # type: ignore[attr-defined]
    once = worker.model.oriented_weight(0).clone()
    assert scheduler.call("apply", 0, _update(0.1), version=0) == 1
    assert torch.equal(worker.model.oriented_weight(0), once)
    with pytest.raises(WeightVersionMismatchError, match="holds 1 updates, 2 are expected"):
        scheduler.call("apply", 0, _update(0.1), version=2)
    assert scheduler.version == 1


def test_a_new_worker_gets_all_updates_and_contexts(spec: JobSpec) -> None:
    engine = InProcessEngine(spec)
    scheduler = _scheduler(engine)
    pristine = engine._worker.model.oriented_weight(0).clone()
    for layer, size in ((0, 0.1), (1, 0.2), (0, 0.3)):
        scheduler.apply(layer, _update(size))
    expected = [engine._worker.model.oriented_weight(layer).clone() for layer in (0, 1)]
    scheduler._roster.lose(0, WorkerLostError("a test"))
    assert scheduler._roster.anyone() == 0
    worker = engine._worker
    assert worker.weights.version == scheduler.version == 3
    assert worker.contexts == tuple(CONTEXTS)
    assert all(torch.equal(worker.model.oriented_weight(n), expected[n]) for n in (0, 1))
    assert not torch.equal(expected[0], pristine)


# --- losses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after_work", [False, True])
def test_a_loss_at_any_call_changes_no_bit(
    tiny: TinyJobs,
    spec: JobSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after_work: bool,
) -> None:
    """Every call of a job in turn is lost, with or without its work done."""
    expected = digests(tiny.finished("evaluation.baseline=false", requests=records(6)))
    engines: list[LossyEngine] = []

    def run(lost: set[int]) -> tuple[dict[str, Any], LossyEngine]:
        def start(given: JobSpec) -> LossyEngine:
            engines.append(LossyEngine(given, lost, after_work=after_work))
            return engines[-1]

        monkeypatch.setattr("pipeline.cluster.run.start_engine", start)
        output = tmp_path / f"run-{len(engines)}"
        own = spec.model_copy(
            update={"output": spec.output.model_copy(update={"path": str(output)})}
        )
        return digests(read(run_batch_edit(own).path)), engines[-1]

    found, engine = run(set())
    assert found == expected and engine.restarts == 0
    num_calls = engine.calls
    # describe, contexts, 2 shards of values, 2 of keys for each of 2 layers, 2 updates, scores,
    # memory
    assert num_calls == 12
    for number in range(num_calls):
        found, engine = run({number})
        assert found == expected, f"call {number} was lost"
        assert engine.restarts == 1


def test_losses_while_a_worker_comes_back_are_borne(spec: JobSpec, probes: list[Shard]) -> None:
    engine = LossyEngine(spec, set())
    scheduler = _scheduler(engine)
    scheduler.apply(0, _update(0.1))
    engine.lost = {engine.calls, engine.calls + 2}  # the call, then the new worker's contexts
    settings: dict[str, Any] = {"version": 1, "round": 0}
    heard: list[Ended] = []
    scheduler.observers.append(heard.append)
    outcomes = list(scheduler.run("evaluate", probes, _asked, **settings))
    assert [len(outcome.survivors) for outcome in outcomes] == [5, 5, 5, 3]
    assert engine.restarts == 2
    ended = [(call.outcome, call.shard, call.items, call.retries) for call in heard]
    first = outcomes[0].shard.index
    assert ended[:2] == [("lost", first, 5, 0), ("done", first, 5, 1)]
    assert [outcome for outcome, *_ in ended] == ["lost"] + 4 * ["done"]
    assert all((call.method, call.round, call.version) == ("evaluate", 0, 1) for call in heard)


def test_a_shard_that_is_always_lost_ends_the_job(spec: JobSpec, shards: list[Shard]) -> None:
    engine = LossyEngine(spec, set())
    scheduler = Scheduler(engine, RETRIES, stall_seconds=60)
    engine.lost = {0, 2, 4}  # between them the new workers say that they are there
    with pytest.raises(JobFailedError, match=r"shard 0 was lost 3 times.*call 4 is lost"):
        list(scheduler.run("values", shards, lambda _, items: (items,), version=0, round=0))


def test_a_worker_that_never_comes_back_ends_the_job(spec: JobSpec, shards: list[Shard]) -> None:
    engine = LossyEngine(spec, set())
    scheduler = _scheduler(engine)
    engine.lost = set(range(1000))
    with pytest.raises(JobFailedError, match="worker 0 does not start"):
        list(scheduler.run("values", shards, lambda _, items: (items,), version=0, round=0))


class DeafEngine(InProcessEngine):
    """Gives no answer to some calls, counted from 0, until the worker is replaced."""

    def __init__(self, spec: JobSpec, deaf: set[int]) -> None:
        super().__init__(spec)
        self.deaf, self.calls, self.restarts = deaf, 0, 0
        self.ignored: set[Call] = set()

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        call = super().submit(worker, method, *args, **kwargs)
        if self.calls in self.deaf:
            self.ignored.add(call)
        self.calls += 1
        return call

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        if heard := [call for call in calls if call not in self.ignored]:
            return heard[:1]
        time.sleep(timeout)
        return []

    def restart(self, worker: int) -> None:
        self.restarts += 1
        super().restart(worker)


def test_a_worker_without_an_answer_is_reported_and_then_replaced(
    spec: JobSpec, probes: list[Shard], caplog: pytest.LogCaptureFixture
) -> None:
    engine = DeafEngine(spec, set())
    scheduler = Scheduler(engine, RETRIES, stall_seconds=0.05, call_timeout_seconds=0.5)
    scheduler.set_contexts(tuple(CONTEXTS))
    # The update, and again while the new worker is brought to its version.
    engine.deaf = {engine.calls, engine.calls + 3}
    scheduler.apply(0, _update(0.1))
    assert scheduler.call("peak_memory") and engine.restarts == 2
    engine.deaf = {engine.calls + 1}
    settings: dict[str, Any] = {"version": 1, "round": 0}
    outcomes = list(scheduler.run("evaluate", probes, _asked, **settings))
    assert [len(outcome.survivors) for outcome in outcomes] == [5, 5, 5, 3]
    assert engine.restarts == 3
    assert "evaluate: no answer yet from shard 1 on worker 0 for" in caplog.text
    assert re.search(r"lost \(no answer for \d s, longer than cluster\.call_timeout", caplog.text)


# --- workers that come late ---------------------------------------------------------------------


class LateEngine(InProcessEngine):
    """Two workers in this process, of which the second gives no answer before it is let in."""

    def __init__(self, spec: JobSpec, trouble: Exception | None = None) -> None:
        super().__init__(spec, num_workers=2, late=frozenset({1}))
        self.second, self.trouble, self.is_open = self._new_worker(), trouble, False

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        if ready := [call for call in calls if call.worker == 0 or self.is_open]:
            return ready[:1]
        time.sleep(timeout)
        return []

    def result(self, call: Call) -> Any:
        if call.worker == 0:
            return super().result(call)
        if self.trouble is not None:
            raise self.trouble
        first, self._worker = self._worker, self.second
        try:
            return super().result(call)
        finally:
            self._worker = first


def _evaluated(engine: LateEngine, scheduler: Scheduler, probes: list[Shard]) -> list[Ended]:
    """Apply an update and score; the second worker comes after the first shard."""
    scheduler.apply(0, _update(0.1))
    heard: list[Ended] = []
    scheduler.observers.append(heard.append)
    settings: dict[str, Any] = {"version": 1, "round": 0}
    for _ in scheduler.run("evaluate", probes, _asked, **settings):
        engine.is_open = True
    assert sorted(ended.shard or 0 for ended in heard) == [0, 1, 2, 3]
    return heard


def test_a_late_worker_is_brought_up_to_date_and_takes_shards(
    spec: JobSpec, probes: list[Shard], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("pipeline.cluster.roster._SAY_SECONDS", 0.0)
    engine = LateEngine(spec)
    scheduler = _scheduler(engine)
    heard = _evaluated(engine, scheduler, probes)
    assert {ended.worker for ended in heard} == {0, 1}
    assert engine.second.weights.version == 1 and engine.second.contexts == tuple(CONTEXTS)
    weights = [worker.model.oriented_weight(0) for worker in (engine._worker, engine.second)]
    assert torch.equal(*weights)
    assert "waiting for 1 of 2 workers since 0 s; it needs this process only" in caplog.text
    assert len(scheduler.broadcast("peak_memory")) == 2


def test_a_late_worker_whose_node_lacks_something_is_left_out(
    spec: JobSpec, probes: list[Shard], caplog: pytest.LogCaptureFixture
) -> None:
    engine = LateEngine(spec, InputError("model.path: there is none"))
    heard = _evaluated(engine, _scheduler(engine), probes)
    assert {ended.worker for ended in heard} == {0}
    assert "worker 1 cannot start (model.path: there is none); going on without" in caplog.text
    engine.is_open = True
    with pytest.raises(InputError, match=r"model\.path: there is none"):  # nothing has begun yet
        Scheduler(engine, RETRIES, stall_seconds=60)._roster.gather(1.0)


# --- blame --------------------------------------------------------------------------------------


def test_a_shard_is_split_down_to_the_guilty_item(scheduler: Scheduler) -> None:
    """The covariance of something that is no text fails in the tokenizer."""
    items: list[Any] = [f"The house number {number} is old." for number in range(9)]
    items[0] = items[4] = items[5] = 17
    shard = Shard(3, tuple(items))
    heard: list[Ended] = []
    scheduler.observers.append(heard.append)
    (outcome,) = scheduler.run("covariance", [shard], lambda _, texts: (texts, None))
    assert sum(call.items or 0 for call in heard if call.outcome == "done") == 6
    assert sum(call.items == 1 for call in heard if call.outcome == "failed") == 3
    assert [item for item, _ in outcome.failures] == [17, 17, 17]
    assert all(reason for _, reason in outcome.failures)
    assert outcome.survivors == tuple(item for item in items if item != 17)
    assert [piece.start for piece in outcome.done] == sorted(piece.start for piece in outcome.done)
    with pytest.raises((TypeError, ValueError)):
        list(scheduler.run("covariance", [shard], lambda _, texts: (texts, None), split=False))


def test_the_reason_names_the_error_in_one_line(scheduler: Scheduler, shards: list[Shard]) -> None:
    shard = Shard(0, shards[0].items[:1])
    (outcome,) = scheduler.run(
        "values", [shard], lambda _, items: (items, "surplus"), version=0, round=0
    )
    ((request, reason),) = outcome.failures
    assert request is shard.items[0] and outcome.done == []
    assert reason.startswith("TypeError: ") and "\n" not in reason


def test_a_probe_without_a_token_is_blamed_alone(scheduler: Scheduler, shards: list[Shard]) -> None:
    (whole,) = probe_shards(shards, ["rewrite", "paraphrase"])
    bad = replace(whole.items[7], prompt="")
    items = (*whole.items[:7], bad, *whole.items[8:])
    settings: dict[str, Any] = {"version": 0, "round": -1}
    (outcome,) = scheduler.run("evaluate", [Shard(0, items)], _asked, **settings)
    ((probe, reason),) = outcome.failures
    assert probe is bad and "has no token" in reason and bad.case_id in reason
    assert outcome.survivors == (*items[:7], *items[8:])
    assert sum(piece.result.num_rows for piece in outcome.done) == 11


# --- shards -------------------------------------------------------------------------------------


@given(count=st.integers(0, 40_000), size=st.one_of(st.just("auto"), st.integers(1, 50_000)))
@settings(max_examples=50, deadline=None)
def test_shards_hold_every_request_once_in_order(count: int, size: Any) -> None:
    requests: Any = range(count)
    shards = cut_shards(requests, size)
    assert [item for shard in shards for item in shard.items] == list(range(count))
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(shard.items for shard in shards)
    longest = max((len(shard.items) for shard in shards), default=0)
    assert longest <= (256 if size == "auto" else size)
    if size == "auto" and count >= 16:
        assert longest >= 16
