"""The job of causal tracing: facts in shards to the workers, a part of trace/ a shard.

It is planned, recorded and gone on with as an editing job is; nothing is edited.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cluster.covariance import Covariances
from pipeline.cluster.outcomes import num_items, rows_and_failures, shards_left
from pipeline.cluster.plan import Plan, make_plan
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.record import begin_run, go_on, recording_end
from pipeline.cluster.resume import open_earlier, require_same_job, require_same_model
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.cluster.run import RunResult, make_scheduler, start_engine
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.worker import WorkerDescription
from pipeline.errors import InputError
from pipeline.requests import EditRequest
from pipeline.results.driving import driving
from pipeline.results.manifest import read_begun
from pipeline.results.remote import next_free_place
from pipeline.results.store import RunStore
from pipeline.spec import (
    CovarianceSpec,
    EvaluationSpec,
    JobSpec,
    MethodSpec,
    TraceSpec,
    ValueSpec,
)
from pipeline.tracing.effects import summarise_trace

# Workers hold one edited weight at least; tracing has no use for it.
_NO_EDITS = MethodSpec(layers=(0,), covariance_weight=1.0, contexts=("{}",), value=ValueSpec())


def run_trace(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None = None,
    *,
    restart: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Trace the facts of all requests on the unedited model and leave a run directory behind.

    The fact is a request's prompt and `target_true`. A run that the directory holds already is gone
    on with, if it is of the same job, to the same bits.

    Args:
        spec: the job; without `trace` it is traced by that group's defaults. Settings of editing
            have no say.
        requests: edit requests given in memory; null reads `spec.requests`.
        restart: begin anew in the first of PATH, PATH-2, PATH-3, ... that is free.
        console: where to show progress; null is silent.

    Raises:
        InputError: the spec, the requests or the model are wrong, or not those that the run was
            begun with, or another driver works on it; nothing was written.
        JobFailedError: the job could not go on; the run directory holds what was finished.
        ResultsDamagedError: the run's manifest is damaged.
    """
    spec = _for_tracing(spec)
    if restart:
        spec = spec.at(next_free_place(spec.place))
    progress = PhaseProgress(console)
    with driving(spec.run_path, spec.url) as progress.mirror:
        return _begin_or_go_on(spec, requests, progress)


def _for_tracing(spec: JobSpec) -> JobSpec:
    """The job without what only editing needs, so that none of it decides."""
    for group in ("rounds", "compare"):
        if getattr(spec, group) is not None:
            raise InputError(f"{group}: tracing has none; set {group} to null")
    chosen: dict[str, Any] = {
        "trace": spec.trace or TraceSpec(),
        "method": _NO_EDITS,
        "covariance": CovarianceSpec(),
        "evaluation": EvaluationSpec(probes=(), baseline=False),
    }
    return spec.model_copy(update=chosen)


def _begin_or_go_on(
    spec: JobSpec, requests: Sequence[EditRequest] | None, progress: PhaseProgress
) -> RunResult:
    store = open_earlier(spec)
    plan = make_plan(spec, requests)
    if store is not None:
        require_same_job(store, plan)
        for part, _ in store.damaged():
            progress.say(f"{part.name} is damaged and computed again")
            store.withdraw(part)
        done = read_begun(store).status == "finished" and (store.path / "summary.json").is_file()
        if done and not shards_left(store, "trace", BASELINE_ROUND, plan.shards):
            progress.say(f"{store.place} is complete; nothing is left to do")
            return RunResult(store.path, store.read_json("summary.json"), store.place)
        progress.say(f"{store.place}: going on with the run that was begun")
        progress.seconds.update(read_begun(store).seconds)
    with progress.phase("start", 1):
        engine = start_engine(plan.spec)
    try:
        scheduler = make_scheduler(engine, plan.spec)
        summary = _Tracing(plan, scheduler, progress, store).run(engine.num_workers)
        return RunResult(plan.spec.run_path, summary, plan.spec.place)
    finally:
        engine.close()


class _Tracing:
    """One job under way; `store` is the run that it goes on with, if any."""

    def __init__(
        self, plan: Plan, scheduler: Scheduler, progress: PhaseProgress, store: RunStore | None
    ) -> None:
        self.plan, self.scheduler, self.progress, self.store = plan, scheduler, progress, store

    def run(self, num_workers: int) -> dict[str, Any]:
        """Do the job, and write down why if it ends early; return the summary."""
        with recording_end(lambda: self.store, self.progress, self.plan.spec.run_path):
            store = self._begin(num_workers)
            self._trace(store, self._noise(store))
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

    def _noise(self, store: RunStore) -> float:
        """The noise's standard deviation: of the subjects' embeddings, times `noise_scale`."""
        assert self.plan.spec.trace is not None
        subjects = sorted({r.subject for shard in self.plan.shards for r in shard.items})
        deviation = self.scheduler.call(
            "embedding_deviation", subjects, version=self.scheduler.version
        )  # fmt: skip
        noise = float(deviation * self.plan.spec.trace.noise_scale)
        store.update_manifest(noise={"embedding_deviation": deviation, "noise": noise})
        return noise

    def _trace(self, store: RunStore, noise: float) -> None:
        shards = self.plan.shards
        left = shards_left(store, "trace", BASELINE_ROUND, shards)
        version, total = self.scheduler.version, num_items(shards)
        with self.progress.phase("trace", total, total - num_items(left)) as ticker:
            outcomes = self.scheduler.run(
                "trace", left, lambda _, items: (items, noise), version=version
            )
            for outcome in outcomes:
                rows, failed = rows_and_failures("trace", outcome)
                store.write_part(
                    "trace",
                    rows,
                    round=BASELINE_ROUND,
                    shard=outcome.shard.index,
                    weight_version=version,
                    failed=failed,
                )
                ticker.advance(len(outcome.shard.items))

    def _finish(self, store: RunStore) -> dict[str, Any]:
        memory = self.scheduler.broadcast("peak_memory")
        failed = store.failed("trace", BASELINE_ROUND)
        statuses = Counter(row.status for row in self.plan.rows)
        skipped = sum(reason.startswith("skipped: ") for reason in failed.values())
        seconds = {name: round(value, 3) for name, value in self.progress.seconds.items()}
        summary = {
            "name": self.plan.spec.name,
            "requests": {
                "traced": statuses["accepted"] - len(failed),
                "skipped": skipped,
                "rejected": statuses["rejected"],
                "conflict": statuses["conflict"],
                "failed": len(failed) - skipped,
            },
            "trace": summarise_trace(store.read_parts("trace")),
            "seconds": seconds,
        }
        store.write_json("summary.json", summary)
        store.update_manifest(
            status="finished",
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            bytes={"trace": sum(part.bytes for part in store.parts("trace"))},
            peak_worker_memory_bytes=memory,
        )
        return summary
