"""A round of a method that keeps edits in a memory: workers make rows, which are the change."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.outcomes import rows_of
from pipeline.cluster.progress import PhaseProgress, Ticker
from pipeline.cluster.scheduler import Scheduler
from pipeline.errors import JobFailedError
from pipeline.methods import MemoryMethod
from pipeline.requests import EditRequest
from pipeline.results.schemas import SCHEMAS
from pipeline.results.store import RunStore
from pipeline.results.updates import read_update, write_update

log = logging.getLogger(__name__)

# Edits embedded at once; a round is one piece of work, so that its rows are one part.
EDITS_OF_A_PIECE = 256


@dataclass(frozen=True)
class Remembering:
    """Puts one round after another into the memory.

    Attributes:
        method: what makes rows and changes.
        scheduler: reaches the workers.
        store: the run.
        worker: says which model it is.
        progress: shows how far it is.
    """

    method: MemoryMethod
    scheduler: Scheduler
    store: RunStore
    worker: WorkerDescription
    progress: PhaseProgress

    def train(self, requests: Sequence[EditRequest], round: int) -> dict[str, str]:
        """Remember a round's requests; a round that the run holds already is applied as it is.

        Returns:
            The requests that failed, case_id -> reason.

        Raises:
            JobFailedError: not one of several requests can be remembered.
        """
        is_held = self.store.has_part("memory", round, 0)
        total = len(requests)
        with self.progress.phase("memory", total, total if is_held else 0) as ticker:
            if not is_held:
                self._remember(requests, round, ticker)
        (layer,) = self.method.layers
        if layer not in self.store.layers("update", round):
            self._write(round, layer)
        path = self.store.layers("update", round)[layer]
        change = read_update(path)[1]
        self.scheduler.apply(layer, change, reload=lambda: read_update(path)[1])
        return self.store.failed("memory", round, {0})

    def _remember(self, requests: Sequence[EditRequest], round: int, ticker: Ticker) -> None:
        tables: dict[int, pa.Table] = {}
        failed: dict[str, str] = {}
        version = self.scheduler.version
        for outcome in self.scheduler.run(
            "remember",
            cut_shards(requests, EDITS_OF_A_PIECE),
            lambda _, items: (items,),
            version=version,
            round=round,
        ):
            tables[outcome.shard.index] = rows_of("memory", outcome)
            failed |= {request.case_id: reason for request, reason in outcome.failures}
            ticker.advance(len(outcome.shard.items))
        whole = [SCHEMAS["memory"].empty_table(), *(tables[index] for index in sorted(tables))]
        rows = pa.concat_tables(whole)
        if not rows.num_rows and len(requests) > 1:
            reason = next(iter(failed.values()))
            raise JobFailedError(
                f"no request can be remembered; the first reason: {reason}; see {self.store.place}"
            )
        if not rows.num_rows:
            # Where rounds are single edits, one that fails is no reason to end the study.
            log.warning("round %d: no request can be remembered; its change is empty", round)
        self.store.write_part(
            "memory", rows, round=round, shard=0, weight_version=version, failed=failed
        )

    def _write(self, round: int, layer: int) -> None:
        rows = self.store.read_parts("memory", round).to_pylist()
        write_update(
            self.store,
            round=round,
            layer=layer,
            weight_name=self.worker.weight_names[layer],
            update=self.method.change(rows),
            metadata={"method": self.method.spec.name, "fingerprint": self.worker.fingerprint},
        )
