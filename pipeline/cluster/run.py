"""The batch job: values, then layer by layer keys, reduce and update, then the evaluation."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from pipeline.cluster.covariance import Covariances, ensure_covariances
from pipeline.cluster.engine import Engine, InProcessEngine
from pipeline.cluster.insertion import insert
from pipeline.cluster.plan import Plan, make_plan, probe_shards, settle_spec
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.record import (
    begin_run,
    edit_rows,
    finish_run,
    save_edited_model,
)
from pipeline.cluster.scheduler import Outcome, Scheduler, Shard
from pipeline.cluster.worker import WorkerDescription
from pipeline.errors import JobFailedError
from pipeline.requests import EditRequest
from pipeline.results.schemas import SCHEMAS
from pipeline.results.store import RunStore, require_fresh
from pipeline.spec import JobSpec

log = logging.getLogger(__name__)

BASELINE_ROUND = -1
ROUND = 0


@dataclass(frozen=True)
class RunResult:
    """What a finished job leaves.

    Attributes:
        path: the run directory.
        summary: what summary.json holds.
    """

    path: Path
    summary: dict[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Requests by status: applied, rejected, conflict, failed."""
        return dict(self.summary["requests"])


def run_batch_edit(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None = None,
    *,
    console: Console | None = None,
) -> RunResult:
    """Edit all requests in one batch and leave a run directory behind.

    Args:
        spec: the job; settings left null are taken from the model's published defaults.
        requests: edit requests given in memory; null reads `spec.requests`.
        console: where to show progress; null is silent.

    Returns:
        The run directory and its summary.

    Raises:
        InputError: the spec, the requests or the model are wrong; nothing was written.
        JobFailedError: the job could not go on; the run directory holds what was finished.
    """
    require_fresh(spec.run_path)
    plan = make_plan(spec, requests)
    progress = PhaseProgress(console)
    with progress.phase("start", 1):
        engine = start_engine(plan.spec)
    try:
        return _Batch(plan, engine, progress).run()
    finally:
        engine.close()


def run_covariance(spec: JobSpec, *, console: Console | None = None) -> Covariances:
    """Compute the covariance of every edited layer, or find it already there.

    Raises:
        InputError: the spec, the corpus or the model is wrong.
        FingerprintMismatchError: `covariance.path` holds one that was made for something else.
    """
    _, spec, _ = settle_spec(spec)
    progress = PhaseProgress(console)
    with progress.phase("start", 1):
        engine = start_engine(spec)
    try:
        scheduler = Scheduler(engine, spec.cluster.max_retries, spec.cluster.stall_seconds)
        return ensure_covariances(spec, scheduler, scheduler.call("describe"), progress)
    finally:
        engine.close()


def start_engine(spec: JobSpec) -> Engine:
    """Start the workers that a resolved spec asks for."""
    if spec.cluster.engine == "in_process":
        return InProcessEngine(spec)
    # Ray is imported only where it is used: the core and this engine run without it.
    from pipeline.cluster.ray_engine import RayEngine

    return RayEngine(spec)


class _Batch:
    """One batch job under way."""

    def __init__(self, plan: Plan, engine: Engine, progress: PhaseProgress) -> None:
        self.plan, self.engine, self.progress = plan, engine, progress
        cluster = plan.spec.cluster
        self.scheduler = Scheduler(engine, cluster.max_retries, cluster.stall_seconds)
        self.failures: dict[str, str] = {}

    def run(self) -> RunResult:
        """Do the job; reads like the picture in docs/design.md."""
        worker: WorkerDescription = self.scheduler.call("describe")
        covariances = ensure_covariances(self.plan.spec, self.scheduler, worker, self.progress)
        contexts = self._contexts()
        store = begin_run(self.plan, worker, contexts, covariances, self.engine.num_workers)
        evaluation = self.plan.spec.evaluation
        if evaluation.baseline:
            self._evaluate(store, "baseline", BASELINE_ROUND)
        self._values(store)
        live = self._live_shards(store)
        insert(self.plan.spec, self.scheduler, store, live, covariances, worker, self.progress)
        self._evaluate(store, "evaluation", ROUND)
        store.write_part(
            "edits",
            edit_rows(self.plan.rows, self.failures, ROUND),
            round=ROUND,
            shard=0,
            weight_version=self.scheduler.version,
        )
        if self.plan.spec.output.save_model:
            applied = self.plan.num_requests - len(self.failures)
            save_edited_model(store, self.scheduler, applied)
        memory = self.scheduler.broadcast("peak_memory")
        return RunResult(store.path, finish_run(store, self.progress, memory))

    def _contexts(self) -> tuple[str, ...]:
        contexts = self.plan.spec.method.contexts or self.scheduler.call("generate_contexts")
        self.scheduler.set_contexts(contexts)
        return contexts

    def _values(self, store: RunStore) -> None:
        """Search all values; a finished shard's part is the point to resume from."""
        shards = self.plan.shards
        with self.progress.phase("values", self.plan.num_requests) as ticker:
            outcomes = self.scheduler.run(
                "values", shards, lambda _, items: (items,), version=0, round=ROUND
            )
            for outcome in outcomes:
                rows = _rows("values", outcome)
                for request, reason in outcome.failures:
                    self.failures[request.case_id] = reason
                finite = self._drop_infinite(rows)
                store.write_part(
                    "values", finite, round=ROUND, shard=outcome.shard.index, weight_version=0
                )
                ticker.advance(len(outcome.shard.items))

    def _live_shards(self, store: RunStore) -> list[Shard]:
        """The shards without the requests that have failed."""
        live = [
            Shard(s.index, tuple(r for r in s.items if r.case_id not in self.failures))
            for s in self.plan.shards
        ]
        live = [shard for shard in live if shard.items]
        if not live:
            raise JobFailedError(
                f"no request has a value; the first reason: {next(iter(self.failures.values()))};"
                f" see {store.path}"
            )
        return live

    def _evaluate(self, store: RunStore, name: str, round: int) -> None:
        shards = probe_shards(self.plan.shards, self.plan.spec.evaluation.probes)
        version = self.scheduler.version
        with self.progress.phase(name, sum(len(shard.items) for shard in shards)) as ticker:
            outcomes = self.scheduler.run(
                "evaluate",
                shards,
                lambda _, items: (items,),
                version=version,
                round=round,
                edit_round=ROUND,
            )
            for outcome in outcomes:
                for probe, reason in outcome.failures:
                    self.failures[probe.case_id] = f"{probe.kind} probe {probe.index}: {reason}"
                store.write_part(
                    "metrics",
                    _rows("metrics", outcome),
                    round=round,
                    shard=outcome.shard.index,
                    weight_version=version,
                )
                ticker.advance(len(outcome.shard.items))

    def _drop_infinite(self, rows: pa.Table) -> pa.Table:
        """Keep the searches that ended in finite numbers; the others' requests have failed."""
        is_finite = pc.is_finite(rows["loss"])
        for case_id in rows.filter(pc.invert(is_finite))["case_id"].to_pylist():
            self.failures[case_id] = "the value search ran into an infinity or NaN"
        return rows.filter(is_finite)


def _rows(kind: str, outcome: Outcome) -> pa.Table:
    return pa.concat_tables(
        [SCHEMAS[kind].empty_table(), *(piece.result for piece in outcome.done)]
    )
