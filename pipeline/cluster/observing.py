"""Jobs that look at the unedited model, request by request, and edit nothing.

They are planned, recorded and gone on with as an editing job is: requests in shards to the workers,
a part of one table a shard. `cluster/tracing.py` and `cluster/assessing.py` are such jobs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.covariance import Covariances
from pipeline.cluster.outcomes import num_items, rows_and_failures, shards_left
from pipeline.cluster.plan import Plan, make_plan
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.record import begin_run, go_on, recording_end
from pipeline.cluster.resume import open_earlier, require_same_job, require_same_model
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.cluster.run import RunResult, make_scheduler, start_engine
from pipeline.cluster.scheduler import Arguments, Scheduler
from pipeline.errors import InputError
from pipeline.requests import EditRequest
from pipeline.results.driving import driving
from pipeline.results.listing import TableKind
from pipeline.results.manifest import read_begun
from pipeline.results.remote import next_free_place
from pipeline.results.store import RunStore
from pipeline.spec import (
    CovarianceSpec,
    EvaluationSpec,
    JobSpec,
    MethodSpec,
)

# Workers hold one edited weight at least; looking has no use for it. Any model takes the method.
_NO_EDITS = MethodSpec(name="ft", layers=(0,), contexts=("{}",))


@dataclass(frozen=True)
class Observation:
    """What is looked at.

    Attributes:
        table: where its rows go; also the name of its phase, of its entry in the summary and of the
            workers' method, which returns rows and case_id -> why of the requests without any.
        done: what the summary calls a request that has rows.
        check: raises InputError where the requests do not serve, before anything is written.
        arguments: measures what the workers need, writes down what decides the result, and returns
            what makes their arguments.
        summarise: what the summary says of the table.
    """

    table: TableKind
    done: str
    check: Callable[[Plan], object]
    arguments: Callable[[Plan, Scheduler, RunStore], Arguments]
    summarise: Callable[[Plan, pa.Table], Any]


def observe(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None,
    observation: Observation,
    *,
    restart: bool,
    console: Console | None,
) -> RunResult:
    """Look at all requests and leave a run directory behind; raises as `run_trace` does."""
    if restart:
        spec = spec.at(next_free_place(spec.place))
    progress = PhaseProgress(console)
    with driving(spec.run_path, spec.url) as progress.mirror:
        return _begin_or_go_on(spec, requests, observation, progress)


def without_editing(spec: JobSpec, what: str, **groups: Any) -> JobSpec:
    """The job without what only editing needs, so that none of it decides, and with `groups`.

    Raises:
        InputError: it is of a study or a training, which `what` (a noun) is not.
    """
    for group in ("rounds", "compare", "train"):
        if getattr(spec, group) is not None:
            raise InputError(f"{group}: {what} has none; set {group} to null")
    chosen: dict[str, Any] = {
        "method": _NO_EDITS,
        "covariance": CovarianceSpec(),
        "evaluation": EvaluationSpec(probes=(), baseline=False),
    }
    return spec.model_copy(update=chosen | groups)


def _begin_or_go_on(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None,
    observation: Observation,
    progress: PhaseProgress,
) -> RunResult:
    store = open_earlier(spec)
    plan = make_plan(spec, requests)
    observation.check(plan)
    if store is not None:
        require_same_job(store, plan)
        for part, _ in store.damaged():
            progress.say(f"{part.name} is damaged and computed again")
            store.withdraw(part)
        done = read_begun(store).status == "finished" and (store.path / "summary.json").is_file()
        if done and not shards_left(store, observation.table, BASELINE_ROUND, plan.shards):
            progress.say(f"{store.place} is complete; nothing is left to do")
            return RunResult(store.path, store.read_json("summary.json"), store.place)
        progress.say(f"{store.place}: going on with the run that was begun")
        progress.seconds.update(read_begun(store).seconds)
    with progress.phase("start", 1):
        engine = start_engine(plan.spec)
    try:
        scheduler = make_scheduler(engine, plan.spec)
        job = _Job(plan, observation, scheduler, progress, store)
        summary = job.run(engine.num_workers)
        return RunResult(plan.spec.run_path, summary, plan.spec.place)
    finally:
        engine.close()


class _Job:
    """One job under way; `store` is the run that it goes on with, if any."""

    def __init__(
        self,
        plan: Plan,
        observation: Observation,
        scheduler: Scheduler,
        progress: PhaseProgress,
        store: RunStore | None,
    ) -> None:
        self.plan, self.observation, self.scheduler = plan, observation, scheduler
        self.progress, self.store = progress, store

    def run(self, num_workers: int) -> dict[str, Any]:
        """Do the job, and write down why if it ends early; return the summary."""
        with recording_end(lambda: self.store, self.progress, self.plan.spec.run_path):
            store = self._begin(num_workers)
            arguments = self.observation.arguments(self.plan, self.scheduler, store)
            self._look(store, arguments)
            return self._finish(store)

    def _begin(self, num_workers: int) -> RunStore:
        worker: WorkerDescription = self.scheduler.call("describe")
        if self.store is not None:
            require_same_model(self.store, worker)
            go_on(self.store, worker, num_workers)
        else:
            none = Covariances({}, {}, Path())
            method = self.plan.spec.method.model_copy(update={"contexts": ("{}",)})
            self.store = begin_run(self.plan, worker, method, none, num_workers)
        if self.progress.mirror is not None:
            self.progress.mirror.follow(self.store)
        return self.store

    def _look(self, store: RunStore, arguments: Arguments) -> None:
        shards, table = self.plan.shards, self.observation.table
        left = shards_left(store, table, BASELINE_ROUND, shards)
        version, total = self.scheduler.version, num_items(shards)
        with self.progress.phase(table, total, total - num_items(left)) as ticker:
            for outcome in self.scheduler.run(table, left, arguments, version=version):
                rows, failed = rows_and_failures(table, outcome)
                store.write_part(
                    table,
                    rows,
                    round=BASELINE_ROUND,
                    shard=outcome.shard.index,
                    weight_version=version,
                    failed=failed,
                )
                ticker.advance(len(outcome.shard.items))

    def _finish(self, store: RunStore) -> dict[str, Any]:
        table = self.observation.table
        memory = self.scheduler.broadcast("peak_memory")
        failed = store.failed(table, BASELINE_ROUND)
        statuses = Counter(row.status for row in self.plan.rows)
        skipped = sum(reason.startswith("skipped: ") for reason in failed.values())
        seconds = {name: round(value, 3) for name, value in self.progress.seconds.items()}
        summary = {
            "name": self.plan.spec.name,
            "requests": {
                self.observation.done: statuses["accepted"] - len(failed),
                "skipped": skipped,
                "rejected": statuses["rejected"],
                "conflict": statuses["conflict"],
                "failed": len(failed) - skipped,
            },
            table: self.observation.summarise(self.plan, store.read_parts(table)),
            "seconds": seconds,
        }
        store.write_json("summary.json", summary)
        store.update_manifest(
            status="finished",
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            bytes={table: sum(part.bytes for part in store.parts(table))},
            peak_worker_memory_bytes=memory,
        )
        return summary
