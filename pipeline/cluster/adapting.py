"""A round of a method that makes adapters: pieces of its edits on the workers, joined in order."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.outcomes import num_items, shards_left
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Outcome, Scheduler
from pipeline.editing.adapters import Adapter
from pipeline.errors import DivergedError
from pipeline.methods import AdapterMethod, join
from pipeline.requests import EditRequest
from pipeline.results.pieces import read_piece, write_piece
from pipeline.results.store import RunStore
from pipeline.results.updates import read_update, write_update

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapting:
    """Makes the adapters of one round after another, and applies them.

    Attributes:
        method: what makes them.
        scheduler: reaches the workers.
        store: the run.
        worker: names the edited weights.
        progress: shows how far it is.
    """

    method: AdapterMethod
    scheduler: Scheduler
    store: RunStore
    worker: WorkerDescription
    progress: PhaseProgress

    def remember(self, queries: np.ndarray) -> None:
        """Put queries where every worker can read them, once a node."""
        self.scheduler.set_queries(self.scheduler.engine.share(queries))

    def train(self, requests: Sequence[EditRequest], round: int) -> dict[str, str]:
        """Edit a round's requests; what the run holds already is applied as it is.

        Returns:
            The requests that failed, case_id -> reason.

        Raises:
            DivergedError: an adapter is not finite; it reached no model and no update file.
        """
        layers = self.method.layers
        if not set(layers) <= self.store.layers("update", round).keys():
            self._make(requests, round)
            self._join(len(cut_shards(requests, self.method.edits_of_a_piece)), round)
        for layer in layers:
            path = self.store.layers("update", round)[layer]
            self.scheduler.apply(
                layer,
                read_update(path)[1],
                reload=lambda p=path: read_update(p)[1],  # type: ignore[misc]
            )
        return self.store.failed(self.method.table, round)

    def _make(self, requests: Sequence[EditRequest], round: int) -> None:
        """Make the pieces that the run does not hold yet."""
        pieces = cut_shards(requests, self.method.edits_of_a_piece)
        left, total = shards_left(self.store, self.method.table, round, pieces), len(requests)
        with self.progress.phase("training", total, total - num_items(left)) as ticker:
            for outcome in self.scheduler.run(
                "adapt",
                left,
                lambda _, items: (items,),
                version=self.scheduler.version,
                round=round,
            ):
                self._write(outcome, round)
                ticker.advance(len(outcome.shard.items))

    def _write(self, outcome: Outcome, round: int) -> None:
        """Write a piece: its adapters first, its rows last, whose presence says that it is done."""
        made = [piece.result for piece in outcome.done]
        if made:
            adapters = join([one.adapters for one in made])
            _require_finite(adapters)
            write_piece(self.store, adapters, round=round, piece=outcome.shard.index)
        self.store.write_part(
            self.method.table,
            [row for one in made for row in one.rows],
            round=round,
            shard=outcome.shard.index,
            weight_version=self.scheduler.version,
            failed={request.case_id: why for request, why in outcome.failures},
        )

    def _join(self, num_pieces: int, round: int) -> None:
        """Write the round's increment, of its pieces in their order."""
        stored = self.store.layers("piece", round)
        found = [read_piece(stored[piece]) for piece in range(num_pieces) if piece in stored]
        if not found:
            log.warning("round %d: no request could be edited; its adapters are empty", round)
            version = self.scheduler.version
            found = [self.scheduler.call("adapt", (), version=version, round=round).adapters]
        for layer, adapter in join(found).items():
            write_update(
                self.store,
                round=round,
                layer=layer,
                weight_name=self.worker.weight_names[layer],
                update=adapter,
                metadata={
                    "method": self.method.spec.name,
                    "fingerprint": self.worker.fingerprint,
                },
            )


def _require_finite(adapters: dict[int, Adapter]) -> None:
    for layer, adapter in adapters.items():
        if not all(bool(part.isfinite().all()) for part in adapter.parts.values()):
            raise DivergedError(f"layer {layer}: an adapter holds infinities or NaNs")
