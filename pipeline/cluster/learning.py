"""The job that trains an editor: examples to the workers, steps on the reducer, checkpoints.

It is planned, recorded and gone on with as an editing job is; nothing is edited. A part of
training/ and a checkpoint are written together, the checkpoint last: its presence says that all up
to its step is there.
"""

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.engine import WorkerLostError
from pipeline.cluster.examples import Examples
from pipeline.cluster.plan import Plan, make_plan
from pipeline.cluster.progress import PhaseProgress, Ticker
from pipeline.cluster.record import begin_run, go_on, package_versions, recording_end
from pipeline.cluster.resume import open_earlier, require_same_job, require_same_model
from pipeline.cluster.run import RunResult, make_scheduler, start_engine
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.shards import Shard
from pipeline.editors import write_editor
from pipeline.errors import DivergedError, InputError, JobFailedError
from pipeline.methods import resolve_training
from pipeline.methods.trainable import Measured, Shapes, State
from pipeline.requests import EditRequest
from pipeline.results.driving import driving
from pipeline.results.listing import Kind, Part
from pipeline.results.manifest import read_begun
from pipeline.results.remote import next_free_place
from pipeline.results.schemas import TRAINING, conform
from pipeline.results.state import read_state, write_checkpoint
from pipeline.results.store import RunStore
from pipeline.spec import CovarianceSpec, EvaluationSpec, JobSpec, TrainSpec

log = logging.getLogger(__name__)

EDITOR = "editor"
"""The directory of a run that the trained editor is left in."""

_OPTIONAL = tuple(field.name for field in TRAINING if field.nullable and field.name != "split")


def run_training(
    spec: JobSpec,
    requests: Sequence[EditRequest] | None = None,
    *,
    restart: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Train an editor on all requests and leave a run directory behind, with the editor in it.

    A run that the directory holds already is gone on with from its last checkpoint, if it is of the
    same job, to the same bits.

    Args:
        spec: the job; without `train` that group's defaults count. Settings of the covariance and
            the evaluation have no say.
        requests: edit requests given in memory; null reads `spec.requests`.
        restart: begin anew in the first of PATH, PATH-2, PATH-3, ... that is free.
        console: where to show progress; null is silent.

    Raises:
        InputError: the spec, the requests or the model are wrong, or not those that the run was
            begun with, or another driver works on it; nothing was written.
        JobFailedError: the job could not go on; the run directory holds what was finished.
        ResultsDamagedError: the run's manifest is damaged.
    """
    spec = training_spec(spec)
    if restart:
        spec = spec.at(next_free_place(spec.place))
    progress = PhaseProgress(console)
    with driving(spec.run_path, spec.url) as progress.mirror:
        return _begin_or_go_on(spec, requests, progress)


def training_spec(spec: JobSpec) -> JobSpec:
    """The job without what only editing needs, so that none of it decides.

    Raises:
        InputError: it has a group that trainings have not, or the method has nothing to train.
    """
    for group in ("rounds", "compare", "survey", "trace"):
        if getattr(spec, group) is not None:
            raise InputError(f"{group}: a training has none; set {group} to null")
    chosen: dict[str, Any] = {
        "train": spec.train or TrainSpec(),
        "covariance": CovarianceSpec(),
        "evaluation": EvaluationSpec(probes=(), baseline=False),
    }
    return resolve_training(spec.model_copy(update=chosen))


def _begin_or_go_on(
    spec: JobSpec, requests: Sequence[EditRequest] | None, progress: PhaseProgress
) -> RunResult:
    store = open_earlier(spec)
    plan = make_plan(spec, requests)
    examples = Examples(plan)
    if store is not None:
        require_same_job(store, plan)
        dropped = _drop_damaged(store, progress)
        if not dropped and _is_complete(store):
            progress.say(f"{store.place} is complete; nothing is left to do")
            return RunResult(store.path, store.read_json("summary.json"), store.place)
        progress.say(f"{store.place}: going on with the run that was begun")
        progress.seconds.update(read_begun(store).seconds)
    with progress.phase("start", 1):
        engine = start_engine(plan.spec)
    try:
        scheduler = make_scheduler(engine, plan.spec)
        job = _Learning(plan, examples, scheduler, progress, store)
        return RunResult(plan.spec.run_path, job.run(engine.num_workers), plan.spec.place)
    finally:
        engine.close()


def _drop_damaged(store: RunStore, progress: PhaseProgress) -> int:
    """Unlist damaged parts, to be made again, and with rows all others; return how many."""
    lost = [part for part, _ in store.damaged()]
    for part in lost:
        progress.say(f"{part.name} is damaged and made again")
        store.withdraw(part)
    rows = [part.shard for part in lost if part.shard is not None]
    for part in [*store.parts("checkpoint"), *store.parts("training")] if rows else []:
        store.withdraw(part)
    return len(lost)


def _is_complete(store: RunStore) -> bool:
    finished = read_begun(store).status == "finished"
    return finished and all((store.path / name).exists() for name in ("summary.json", EDITOR))


class _Learning:
    """One job under way; `store` is the run that it goes on with, if any."""

    def __init__(
        self,
        plan: Plan,
        examples: Examples,
        scheduler: Scheduler,
        progress: PhaseProgress,
        store: RunStore | None,
    ) -> None:
        assert plan.spec.train is not None
        self.plan, self.examples, self.train = plan, examples, plan.spec.train
        self.scheduler, self.progress, self.store = scheduler, progress, store
        self.engine = scheduler.engine
        self._step = 0

    def run(self, num_workers: int) -> dict[str, Any]:
        """Do the job, and write down why if it ends early; return the summary."""
        with recording_end(lambda: self.store, self.progress, self.plan.spec.run_path):
            worker: WorkerDescription = self.scheduler.call("describe")
            store = self._begin(worker, num_workers)
            with self.progress.phase("training", self.train.steps, _steps_done(store)) as ticker:
                editor = self._learn(store, worker, ticker)
            return self._finish(store, worker, editor)

    def _begin(self, worker: WorkerDescription, num_workers: int) -> RunStore:
        if self.store is not None:
            require_same_model(self.store, worker)
            go_on(self.store, worker, num_workers)
        else:
            method = self.plan.spec.method
            self.store = begin_run(self.plan, worker, method, None, num_workers)
        if self.progress.mirror is not None:
            self.progress.mirror.follow(self.store)
        return self.store

    def _learn(self, store: RunStore, worker: WorkerDescription, ticker: Ticker) -> State:
        """Make all steps, from the last checkpoint again where the reducer is lost."""
        lost = 0
        while True:
            try:
                return self._go_on(store, worker, ticker)
            except WorkerLostError as error:
                lost += 1
                log.warning("the reducer was lost (%s); going on from the last checkpoint", error)
                if lost > self.plan.spec.cluster.max_retries:
                    raise JobFailedError(f"the reducer keeps dying: {error}") from error
            except InputError:
                raise
            except ValueError as error:
                raise DivergedError(f"step {self._step}: {error}") from error

    def _go_on(self, store: RunStore, worker: WorkerDescription, ticker: Ticker) -> State:
        """Make the steps that are left; return the editor's parameters."""
        step = _steps_done(store)
        shapes = Shapes(worker.hidden_size, worker.key_sizes)
        since_best: int = self.engine.reduce(
            "begin_training", self.plan.spec, shapes, _last_state(store)
        )
        rows: list[dict[str, Any]] = []
        while not self._is_done(step, since_best):
            self._step = step
            start = time.perf_counter()
            measured = self._do(self.examples.step(step), learns=True)
            rows.append(self._row(step, measured, "train", start))
            step += 1
            if self._validates(step):
                start = time.perf_counter()
                measured = self._measure()
                since_best = self.engine.reduce("validated", measured)
                rows.append(self._row(step - 1, measured, "validation", start))
            if step % self.train.checkpoint_every == 0 or self._is_done(step, since_best):
                self._keep(store, rows, step)
                rows = []
            ticker.advance(1)
        editor: State = self.engine.reduce("trained_editor")
        return editor

    def _is_done(self, step: int, since_best: int) -> bool:
        patience = self.train.patience
        return step >= self.train.steps or (patience is not None and since_best >= patience)

    def _validates(self, step: int) -> bool:
        is_due = step % self.train.validate_every == 0 or step == self.train.steps
        return is_due and bool(self.examples.measured)

    def _do(self, pieces: list[Shard], *, learns: bool) -> Measured:
        """Make a step of its pieces, or measure on them.

        Raises:
            DivergedError: the loss is not finite.
        """
        shared = self.engine.reduce("begin_step", learns)
        passes = self.examples.trainable.passes
        for number in range(passes):
            given = self.engine.share(shared)
            outcomes = self.scheduler.run(
                "contribute",
                pieces,
                lambda _, items, number=number, given=given: (items, number, given),  # type: ignore[misc]
                split=False,
                learns=learns,
                version=self.scheduler.version,
            )
            for outcome in outcomes:
                self.engine.reduce("add", outcome.shard.index, outcome.done[0].reference)
            if number < passes - 1:
                shared = self.engine.reduce("end_pass", number, len(pieces))
        measured: Measured = self.engine.reduce("end_step", len(pieces))
        if not math.isfinite(measured.measures["loss"]):
            raise DivergedError(
                f"step {self._step}: the loss is not finite any more; take a smaller"
                " train.learning_rate"
            )
        return measured

    def _measure(self) -> Measured:
        """The mean over all held requests."""
        found = [self._do(pieces, learns=False) for pieces in self.examples.measured]
        count = sum(part.count for part in found)
        means = {
            name: sum(part.measures[name] * part.count for part in found) / count
            for name in found[0].measures
        }
        return Measured(count, means)

    def _row(self, step: int, measured: Measured, split: str, start: float) -> dict[str, Any]:
        named = {name: measured.measures.get(name) for name in _OPTIONAL}
        return {
            "round": 0,
            "epoch": self.examples.epoch(step),
            "step": step,
            "edits": measured.count,
            "loss": measured.measures["loss"],
            "seconds": time.perf_counter() - start,
            "split": split,
            **named,
        }

    def _keep(self, store: RunStore, rows: list[dict[str, Any]], step: int) -> None:
        """Write rows and checkpoint, and take the checkpoints before it away."""
        before = store.parts("checkpoint")
        store.write_part(
            "training",
            conform("training", rows),
            round=0,
            shard=-(-step // self.train.checkpoint_every) - 1,
            weight_version=0,
        )
        write_checkpoint(store, self.engine.reduce("checkpoint"), steps=step)
        for part in before:
            _remove(store, part)

    def _finish(self, store: RunStore, worker: WorkerDescription, editor: State) -> dict[str, Any]:
        rows = store.read_parts("training").to_pylist()
        validation = _best([row for row in rows if row["split"] == "validation"])
        steps = _steps_done(store)
        target = store.path / EDITOR
        shutil.rmtree(target, ignore_errors=True)
        spec = self.plan.spec
        card = {
            "kind": spec.method.name,
            "fingerprint": worker.fingerprint,
            "model": spec.model.path,
            "layers": spec.method.layers,
            "settings": self.examples.trainable.settings(),
            "train": {**self.train.model_dump(mode="json"), "seed": spec.seed},
            "requests_sha256": self.plan.requests_digest(),
            "steps": steps,
            "validation": validation,
            "versions": package_versions(),
        }
        write_editor(target, card, editor)
        return self._close(store, steps, validation)

    def _close(self, store: RunStore, steps: int, validation: dict[str, float]) -> dict[str, Any]:
        statuses = Counter(row.status for row in self.plan.rows)
        seconds = {name: round(value, 3) for name, value in self.progress.seconds.items()}
        summary = {
            "name": self.plan.spec.name,
            "requests": {
                "trained": len(self.examples.learnt),
                "validation": len(self.examples.held),
                "rejected": statuses["rejected"],
                "conflict": statuses["conflict"],
                "failed": 0,
            },
            "training": {
                "method": self.plan.spec.method.name,
                "editor": EDITOR,
                "steps": steps,
                "validation": validation,
            },
            "seconds": seconds,
        }
        store.write_json("summary.json", summary)
        kinds: tuple[Kind, ...] = ("training", "checkpoint")
        store.update_manifest(
            status="finished",
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            bytes={kind: sum(part.bytes for part in store.parts(kind)) for kind in kinds},
            peak_worker_memory_bytes=self.scheduler.broadcast("peak_memory"),
        )
        return summary


def _steps_done(store: RunStore) -> int:
    return max((part.round for part in store.parts("checkpoint")), default=0)


def _last_state(store: RunStore) -> dict[str, Any] | None:
    steps = _steps_done(store)
    return read_state(store.layers("checkpoint", steps)[0]) if steps else None


def _remove(store: RunStore, part: Part) -> None:
    store.withdraw(part)
    store.path_of(part).unlink(missing_ok=True)


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The measurement with the least loss, and its step; nothing without one."""
    if not rows:
        return {}
    best = min(rows, key=lambda row: row["loss"])
    names = ("step", "edits", "loss", *_OPTIONAL)
    return {name: best[name] for name in names if best[name] is not None}
