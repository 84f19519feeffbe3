"""A job under way: round after round of values, updates and scores. A batch job is one round."""

import logging
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cluster.adapting import Adapting
from pipeline.cluster.anchor import measure_anchor
from pipeline.cluster.apart import Lane, run_lanes
from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.covariance import Covariances, ensure_covariances
from pipeline.cluster.divergence import find_ruin, not_taken, stop_or_warn
from pipeline.cluster.engine import Engine
from pipeline.cluster.general import measure_general
from pipeline.cluster.insertion import Insertion
from pipeline.cluster.locating import Locating
from pipeline.cluster.outcomes import (
    failed_probes,
    num_items,
    rows_of,
    shards_left,
)
from pipeline.cluster.past import PastGrams
from pipeline.cluster.plan import Plan, cut_probes
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.queries import gather_queries
from pipeline.cluster.record import (
    begin_run,
    edit_rows,
    finish_run,
    go_on,
    recording_end,
    save_edited_model,
)
from pipeline.cluster.remembering import Remembering
from pipeline.cluster.resume import (
    earlier_spec,
    holds_all_updates,
    require_same_covariances,
    require_same_model,
    require_same_queries,
)
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.shards import Shard
from pipeline.cluster.sharing import Sharing, take_over, unedited_key, values_key
from pipeline.cluster.training import Training
from pipeline.cluster.value_search import search_values, search_values_apart, without
from pipeline.editors import require_own_editor
from pipeline.errors import DivergedError, JobFailedError
from pipeline.methods import (
    build_adapter_method,
    build_gradient_method,
    build_locating_method,
    build_memory_method,
    build_method,
)
from pipeline.requests import EditRequest
from pipeline.results.listing import Kind
from pipeline.results.seconds import write_seconds
from pipeline.results.store import RunStore
from pipeline.spec import MethodSpec
from pipeline.watching import logs

log = logging.getLogger(__name__)

# Where a round has fewer edits, all of them getting worse says little about the model.
_LEAST_TO_JUDGE_A_ROUND_BY = 10

# What a round that diverged may have written already; its values stay.
_OF_UPDATES: tuple[Kind, ...] = ("update", "keys", "training", "piece", "memory")

_Writer = Insertion | Training | Locating | Adapting | Remembering


class Study:
    """One job under way.

    Args:
        plan: what to do.
        engine: its workers and its reducer.
        scheduler: runs its phases over them.
        progress: shows how far it is.
        earlier: the run that it goes on with, if any.
        sharing: what it shares with the studies beside it.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        scheduler: Scheduler,
        progress: PhaseProgress,
        earlier: RunStore | None,
        sharing: Sharing | None = None,
    ) -> None:
        self.plan, self.engine, self.scheduler = plan, engine, scheduler
        self.progress, self.earlier = progress, earlier
        if progress.watch is not None:
            scheduler.observers.append(progress.watch.call_ended)
        self.sharing = sharing or Sharing()
        self.is_batch = plan.spec.rounds is None
        self.store: RunStore | None = None
        self.failures: dict[str, str] = {}
        self._baseline: pa.Table | None = None

    def run(self) -> dict[str, Any]:
        """Do the job, and write down why if it ends early; return the summary."""
        with recording_end(lambda: self.store, self.progress, self.plan.spec.run_path):
            return self._run()

    def _run(self) -> dict[str, Any]:
        """Reads like the picture in docs/design.md."""
        worker: WorkerDescription = self.scheduler.call("describe")
        require_own_editor(self.plan.spec.method, worker.fingerprint)
        if self.plan.spec.method.is_memory:
            self.scheduler.prepare()
        covariances = self._covariances(worker)
        store = self._begin(worker, covariances)
        if self.plan.spec.evaluation.baseline:
            self._ask_unedited(store)
        if self.plan.spec.rolls_back:
            self._rounds_apart(store, covariances, worker)
            return self._finish(store)
        writer = self._writer(store, covariances, worker)
        for round in range(len(self.plan.rounds.shards)):
            with logs.about(round=round):
                self._timed_round(store, writer, round)
        return self._finish(store)

    def _rounds_apart(
        self, store: RunStore, covariances: Covariances | None, worker: WorkerDescription
    ) -> None:
        """Make every round from the unedited model, as many at once as there are workers."""
        if self.plan.spec.method.is_closed_form:
            search_values_apart(self.plan, self.scheduler, store, self.progress)
        # Made once, on all workers: what it tells them, every lane's worker knows.
        writer = self._writer(store, covariances, worker)

        def make(number: int, lane: Lane) -> None:
            beside = Study(self.plan, lane.engine, lane.scheduler, lane.progress, self.earlier)
            beside.store = store
            own = replace(writer, scheduler=lane.scheduler, progress=lane.progress)
            beside._round_apart(store, own, number)
            lane.scheduler.revert()

        left = [
            round
            for round in range(len(self.plan.rounds.shards))
            if not store.has_part("edits", round, 0)
        ]
        run_lanes(self.engine, self.scheduler, self.progress, self.plan, left, make)

    def _round_apart(self, store: RunStore, writer: _Writer, round: int) -> None:
        """Make one round; if it diverges its edits have failed, and no other round knows."""
        try:
            self._timed_round(store, writer, round)
        except DivergedError as error:
            requests = self.plan.rounds.requests(round)
            log.warning("round %d diverged: %s", round, error)
            self.failures |= {request.case_id: f"it diverged: {error}" for request in requests}
            self.scheduler.revert()
            for kind in _OF_UPDATES:
                for part in store.parts(kind, round):
                    store.withdraw(part)
            self._timed_round(store, writer, round)

    def _ask_unedited(self, store: RunStore) -> None:
        """Score and measure the unedited model, unless a study beside this one has done so."""
        key = unedited_key(self.plan.spec)
        with self.sharing.turn(key) as twin:
            if twin is not None:
                take_over(twin, store, "metrics", BASELINE_ROUND)
                take_over(twin, store, "general", BASELINE_ROUND)
            self._evaluate(store, "baseline", BASELINE_ROUND)
            self._measure_general(store, BASELINE_ROUND)
            self.sharing.is_done(key, store)

    def _timed_round(self, store: RunStore, writer: _Writer, round: int) -> None:
        if self.is_batch:
            self._round(store, writer, round)
            return
        is_new = not store.has_part("edits", round, 0)
        self.progress.label = f"{round + 1}/{len(self.plan.rounds.shards)} "
        before = dict(self.progress.seconds)
        self._round(store, writer, round)
        self.progress.label = ""
        if is_new:
            seconds = self.progress.since(before)
            write_seconds(store.path, round, seconds)
            took = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
            self.progress.say(f"round {round}: {took}")

    def _round(self, store: RunStore, writer: _Writer, round: int) -> None:
        if isinstance(writer, Insertion):
            self._insert(store, writer, round)
        elif isinstance(writer, Locating):
            self._locate(store, writer, round)
        else:
            self._train(store, writer, round)
        self._evaluate(store, "evaluation", round)
        if round in self.plan.rounds.evaluated:
            self._measure_general(store, round)
        metrics = store.read_parts("metrics", round)
        if not store.has_part("edits", round, 0):
            of_round = metrics.filter(pc.equal(metrics["edit_round"], round))
            self._write_edits(store, not_taken(of_round, round), round)
        if metrics.num_rows and not self.plan.spec.rolls_back:
            self._require_no_ruin(store, metrics, round)

    def _insert(self, store: RunStore, insertion: Insertion, round: int) -> None:
        for stage, layers in enumerate(self.plan.stages):
            self._find_values(store, round, stage)
            live = self._live_shards(store, round, stage)
            try:
                insertion.insert(live, round, layers)
            except DivergedError as error:
                self._blame(store, [r for shard in live for r in shard.items], error, round)
                raise

    def _train(
        self, store: RunStore, training: Training | Adapting | Remembering, round: int
    ) -> None:
        shards = without(self.plan.rounds.shards[round], self.failures)
        requests = [request for shard in shards for request in shard.items]
        try:
            self.failures |= training.train(requests, round)
        except DivergedError as error:
            self._blame(store, requests, error, round)
            raise

    def _locate(self, store: RunStore, locating: Locating, round: int) -> None:
        shards = without(self.plan.rounds.shards[round], self.failures)
        try:
            self.failures |= locating.edit(shards, round)
        except DivergedError as error:
            self._blame(store, [r for shard in shards for r in shard.items], error, round)
            raise

    def _require_no_ruin(self, store: RunStore, metrics: pa.Table, round: int) -> None:
        if self._baseline is None:
            self._baseline = store.read_parts("metrics", BASELINE_ROUND)
        both = pa.concat_tables([self._baseline, metrics], promote_options="default")
        least = 1 if self.is_batch else _LEAST_TO_JUDGE_A_ROUND_BY
        writes = self.plan.spec.method.writes_targets
        ruin = find_ruin(both, BASELINE_ROUND, round, least, writes_targets=writes)
        if ruin is None:
            return
        if self.plan.spec.output.on_divergence == "stop":
            memory, reducers = self.scheduler.broadcast("peak_memory"), self.engine.reducers_used()
            finish_run(store, self.progress, memory, reducers, status="failed")
        stop_or_warn(self.plan.spec, ruin if self.is_batch else f"round {round}: {ruin}")

    def _write_edits(self, store: RunStore, notes: dict[str, str], round: int) -> None:
        """Write the rows of a round's requests; `notes` are reasons of applied ones."""
        store.write_part(
            "edits",
            edit_rows(self.plan.rows_of(round), self.failures, notes, round),
            round=round,
            shard=0,
            weight_version=self.scheduler.version,
        )

    def _blame(
        self, store: RunStore, requests: list[EditRequest], error: DivergedError, round: int
    ) -> None:
        """Report a round that diverged while it was written, for every request of it."""
        for request in requests:
            is_cause = request.case_id in error.case_ids
            what = "its numbers are not finite" if is_cause else "the batch diverged"
            self.failures[request.case_id] = f"{what}: {error}"
        if not self.plan.spec.rolls_back:
            self._write_edits(store, {}, round)

    def _finish(self, store: RunStore) -> dict[str, Any]:
        memory, reducers = self.scheduler.broadcast("peak_memory"), self.engine.reducers_used()
        if self.plan.spec.output.save_model:
            applied = self.plan.num_requests - len(self.failures)
            save_edited_model(store, self.scheduler, applied)
        return finish_run(store, self.progress, memory, reducers)

    def _covariances(self, worker: WorkerDescription) -> Covariances | None:
        """The covariances, where an update is still to be solved for."""
        if self.earlier is not None:
            require_same_model(self.earlier, worker)
            if holds_all_updates(self.earlier, self.plan):
                return None
        if not self.plan.spec.method.is_closed_form:
            return None
        with self.sharing.turn("covariances"):
            found = ensure_covariances(self.plan.spec, self.scheduler, worker, self.progress)
        if self.earlier is not None:
            require_same_covariances(self.earlier, found)
        return found

    def _begin(self, worker: WorkerDescription, covariances: Covariances | None) -> RunStore:
        """Begin the run or take it up again, with its contexts and its norm anchor."""
        if self.earlier is not None:
            self._settle(earlier_spec(self.earlier).method)
            self.store = self.earlier
            go_on(self.store, worker, self.engine.num_workers)
        else:
            method = self._settle(self.plan.spec.method)
            self.store = begin_run(self.plan, worker, method, covariances, self.engine.num_workers)
        if self.progress.watch is not None:
            self.progress.watch.write_to(self.store.path)
        if self.progress.mirror is not None:
            self.progress.mirror.follow(self.store)
        return self.store

    def _settle(self, method: MethodSpec) -> MethodSpec:
        """Draw and measure on the unedited model what is left to it, and tell the workers."""
        contexts = method.contexts or self.scheduler.call("generate_contexts")
        self.scheduler.set_contexts(contexts)
        method = method.model_copy(update={"contexts": contexts})
        if method.measures_anchor:
            method = method.with_anchor(measure_anchor(self.plan, self.scheduler, self.progress))
        if "nas" in method.wrappers:
            assert method.nas.anchor_norm is not None
            self.scheduler.set_anchor_norm(method.nas.anchor_norm)
        return method

    def _writer(
        self, store: RunStore, covariances: Covariances | None, worker: WorkerDescription
    ) -> _Writer:
        """What turns a round's requests into updates or adapters."""
        spec = self.plan.spec
        if spec.method.is_locating:
            locating = build_locating_method(spec.method)
            return Locating(locating, self.scheduler, store, worker, self.progress)
        if spec.method.is_piecewise:
            return self._adapting(store, worker)
        if spec.method.is_memory:
            memory = build_memory_method(spec.method)
            return Remembering(memory, self.scheduler, store, worker, self.progress)
        if not spec.method.is_closed_form:
            retries, method = spec.cluster.max_retries, build_gradient_method(spec.method)
            carries_over = not spec.rolls_back
            given = self.scheduler, store, worker, self.progress, retries, carries_over
            return Training(method, *given)
        goes_on = not self.is_batch and not spec.rolls_back
        remembers = goes_on and build_method(spec.method).remembers
        past = PastGrams(spec.cluster.reducer_threads) if remembers else None
        return Insertion(spec, self.scheduler, store, covariances, worker, self.progress, past)

    def _adapting(self, store: RunStore, worker: WorkerDescription) -> Adapting:
        """The writer of adapters, with what it remembers of the unedited model."""
        method = build_adapter_method(self.plan.spec.method)
        adapting = Adapting(method, self.scheduler, store, worker, self.progress)
        # A run whose adapters are all made trains none.
        if method.num_queries and not holds_all_updates(store, self.plan):
            queries = gather_queries(
                self.plan.spec, self.scheduler, self.progress, method.num_queries
            )
            require_same_queries(store, queries)
            adapting.remember(queries)
        return adapting

    def _find_values(self, store: RunStore, round: int, stage: int) -> None:
        """Search a stage's values; the very first ones may be those of a study beside this."""
        if round > 0 or stage > 0:
            self._values(store, round, stage)
            return
        key = values_key(self.plan.spec)
        with self.sharing.turn(key) as twin:
            if twin is not None:
                shards = {shard.index for shard in self.plan.value_shards(round, stage)}
                take_over(twin, store, "values", round, shards)
            self._values(store, round, stage)
            self.sharing.is_done(key, store)

    def _values(self, store: RunStore, round: int, stage: int) -> None:
        self.failures |= search_values(
            self.plan,
            self.scheduler,
            store,
            self.progress,
            round=round,
            stage=stage,
            failures=self.failures,
        )

    def _live_shards(self, store: RunStore, round: int, stage: int) -> list[Shard]:
        """The shards without the requests that have failed."""
        live = without(self.plan.value_shards(round, stage), self.failures)
        live = [shard for shard in live if shard.items]
        requests = self.plan.rounds.requests(round)
        is_alone = len(requests) == 1 or self.plan.spec.rolls_back
        if not live and (self.is_batch or not is_alone):
            reason = self.failures[requests[0].case_id]
            where = "" if self.is_batch else f"round {round}: "
            raise JobFailedError(
                f"{where}no request has a value; the first reason: {reason}; see {store.place}"
            )
        if not live:
            # Where rounds are single edits, one that fails is no reason to end the study.
            log.warning("round %d: no request has a value; its updates are empty", round)
        return live

    def _measure_general(self, store: RunStore, round: int) -> None:
        """Measure what the rest of the model lost, where the spec asks for it."""
        measure_general(self.scheduler, store, self.plan.held_out, self.progress, round=round)

    def _evaluate(self, store: RunStore, name: str, round: int) -> None:
        """Score the probes that the run holds no scores of yet."""
        edit_round = self.plan.rounds.edit_round
        shards = cut_probes(self.plan.rounds.probes(round))
        left = shards_left(store, "metrics", round, shards)
        version, total = self.scheduler.version, num_items(shards)
        if not shards and not self.is_batch:
            return
        with self.progress.phase(name, total, total - num_items(left)) as ticker:
            outcomes = self.scheduler.run(
                "evaluate",
                left,
                lambda _, items: (items, [edit_round[probe.case_id] for probe in items]),
                version=version,
                round=round,
            )
            for outcome in outcomes:
                store.write_part(
                    "metrics",
                    rows_of("metrics", outcome),
                    round=round,
                    shard=outcome.shard.index,
                    weight_version=version,
                    failed=failed_probes(outcome),
                )
                ticker.advance(len(outcome.shard.items))
        # An edit of a past round has its row already, whatever becomes of its probes now.
        self.failures |= {
            case_id: reason
            for case_id, reason in store.failed("metrics", round).items()
            if edit_round[case_id] == round
            or (round == BASELINE_ROUND and edit_round[case_id] >= 0)
        }
