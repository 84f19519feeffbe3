"""A round of a gradient method: the workers take gradients, the reducer makes steps of them."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.engine import WorkerLostError
from pipeline.cluster.progress import PhaseProgress, Ticker
from pipeline.cluster.round_updates import apply_stored, finished_update, store_update
from pipeline.cluster.scheduler import Outcome, Scheduler
from pipeline.cluster.shards import Shard
from pipeline.editing.descent import Step
from pipeline.editing.update import Change, Update
from pipeline.errors import JobFailedError
from pipeline.methods import GradientMethod
from pipeline.methods.gradient import State
from pipeline.requests import EditRequest
from pipeline.results.schemas import conform
from pipeline.results.state import read_state, write_state
from pipeline.results.store import RunStore

log = logging.getLogger(__name__)

# Edits whose gradients are taken at once; sums are in this order, whatever the number of workers.
EDITS_OF_A_PIECE = 16


@dataclass
class _Made:
    """What a round's steps have made."""

    updates: Mapping[int, Change]
    state: State
    rows: list[dict[str, Any]] = field(default_factory=list)


class _BlamedError(Exception):
    """Some requests of the first epoch failed: the round begins anew without them."""

    def __init__(self, failures: dict[str, str]) -> None:
        super().__init__(", ".join(failures))
        self.failures = failures


@dataclass(frozen=True)
class Training:
    """Makes the updates of one round after another, and applies them.

    Attributes:
        method: what makes them.
        scheduler: reaches the workers and the reducer.
        store: the run.
        worker: names the edited weights.
        progress: shows how far it is.
        max_retries: times that a round begins anew after its reducer was lost.
        carries_over: whether a round knows what the one before has left; not where rounds are
            rolled back.
    """

    method: GradientMethod
    scheduler: Scheduler
    store: RunStore
    worker: WorkerDescription
    progress: PhaseProgress
    max_retries: int
    carries_over: bool = True

    def train(self, requests: Sequence[EditRequest], round: int) -> dict[str, str]:
        """Edit a round's requests; updates that the run holds already are applied as they are.

        Returns:
            The requests that failed, case_id -> reason.

        Raises:
            JobFailedError: the reducer keeps dying, or no update can be made.
            DivergedError: the loss or an update is not finite; no update reached a weight or file.
        """
        layers = self.method.layers
        stored = self.store.layers("update", round)
        failures = self.store.failed("training", round, {0})
        is_held = set(layers) <= stored.keys() and self.store.has_part("training", round, 0)
        total = len(requests) * self.method.epochs
        with self.progress.phase("training", total, total if is_held else 0) as ticker:
            if not is_held:
                made, failures = self._make(requests, failures, round, ticker)
                self._write(made, failures, round)
            apply_stored(self.scheduler, self.store, layers, round)
        return failures

    def _write(self, made: _Made, failures: dict[str, str], round: int) -> None:
        """Write what was made: the steps first, the updates last, whose presence says it is all."""
        method = self.method.spec
        updates = {
            layer: finished_update(self.scheduler, method, layer, update)
            for layer, update in made.updates.items()
        }
        if not self.store.has_part("training", round, 0):
            self.store.write_part(
                "training",
                conform("training", made.rows),
                round=round,
                shard=0,
                weight_version=self.scheduler.version,
                failed=failures,
            )
        if made.state and self.carries_over:
            write_state(self.store, made.state, round=round, layer=self.method.layers[0])
        stored = self.store.layers("update", round)
        for layer, update in updates.items():
            if layer not in stored:
                store_update(
                    self.store, self.worker, method, round=round, layer=layer, update=update
                )

    def _make(
        self, requests: Sequence[EditRequest], failures: dict[str, str], round: int, ticker: Ticker
    ) -> tuple[_Made, dict[str, str]]:
        """Make a round's updates, anew where a request fails or the reducer is lost."""
        lost = 0
        while True:
            left = [request for request in requests if request.case_id not in failures]
            if not left and not self.carries_over:
                return _Made(self._nothing(), {}), failures
            if not left:
                reason = next(iter(failures.values()))
                raise JobFailedError(
                    f"no request has a gradient; the first reason: {reason}; see {self.store.place}"
                )
            try:
                return self._descend(left, round, ticker), failures
            except _BlamedError as blamed:
                failures = failures | blamed.failures
            except WorkerLostError as error:
                lost += 1
                log.warning("the reducer was lost (%s); beginning the round anew", error)
                if lost > self.max_retries:
                    raise JobFailedError(f"the reducer keeps dying: {error}") from error
            except ValueError as error:
                raise JobFailedError(f"round {round}: {error}") from error

    def _nothing(self) -> dict[int, Update]:
        """Updates of rank 0, of a round that stands alone and in which every request failed."""
        size = self.worker.hidden_size
        return {
            layer: Update.of(torch.zeros(size, 0), torch.zeros(0, self.worker.key_sizes[layer]))
            for layer in self.method.layers
        }

    def _descend(self, requests: Sequence[EditRequest], round: int, ticker: Ticker) -> _Made:
        engine, version = self.scheduler.engine, self.scheduler.version
        weights, pristine = self.scheduler.call("masters", version=version)
        engine.reduce("begin_round", weights, pristine, self._state_before(round))
        changes, rows, done = None, [], 0
        for epoch in range(self.method.epochs):
            steps: list[Step] = []
            for pieces in self._pieces(requests):
                start = time.perf_counter()
                self._take_gradients(pieces, changes, round, is_first=epoch == 0)
                step: Step = engine.reduce("step", len(pieces))
                if step.changes is not None:
                    changes = engine.share(step.changes)
                rows.append(_row(round, epoch, len(steps), step, time.perf_counter() - start))
                steps.append(step)
                ticker.advance(step.edits)
                done += step.edits
            if self.method.is_done(steps):
                break
        if left := len(requests) * self.method.epochs - done:
            ticker.advance(left)
        updates, state = engine.reduce("finish_round")
        return _Made(updates, state, rows)

    def _pieces(self, requests: Sequence[EditRequest]) -> list[list[Shard]]:
        """The steps of an epoch, cut for the workers; a piece has the same number every time."""
        steps, number = [], 0
        for batch in self.method.batches(requests):
            cut = cut_shards(batch, EDITS_OF_A_PIECE)
            steps.append([Shard(number + piece.index, piece.items) for piece in cut])
            number += len(cut)
        return steps

    def _take_gradients(
        self, pieces: list[Shard], changes: Any, round: int, *, is_first: bool
    ) -> None:
        """Bring the factors of a step's edits to the reducer.

        Raises:
            _BlamedError: requests failed that were gone through for the first time.
        """
        outcomes: list[Outcome] = []
        for outcome in self.scheduler.run(
            "gradients",
            pieces,
            lambda _, items: (items, changes),
            split=is_first,
            version=self.scheduler.version,
            round=round,
        ):
            outcomes.append(outcome)
            if not outcome.failures:
                place = outcome.shard.index - pieces[0].index
                self.scheduler.engine.reduce("add", place, outcome.done[0].reference)
        failures = {r.case_id: why for outcome in outcomes for r, why in outcome.failures}
        if failures:
            raise _BlamedError(failures)

    def _state_before(self, round: int) -> State | None:
        """What the round before left behind."""
        if round == 0 or not self.method.remembers or not self.carries_over:
            return None
        return read_state(self.store.layers("state", round - 1)[self.method.layers[0]])


def _row(round: int, epoch: int, number: int, step: Step, seconds: float) -> dict[str, Any]:
    return {
        "round": round,
        "epoch": epoch,
        "step": number,
        "edits": step.edits,
        "loss": step.loss,
        "seconds": seconds,
    }
