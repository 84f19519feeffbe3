"""Insertion: layer by layer, keys from the workers, one update from the reducer, back to all."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.covariance import Covariances
from pipeline.cluster.divergence import stop_or_warn
from pipeline.cluster.engine import WorkerLostError
from pipeline.cluster.past import PastGrams
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.scheduler import Scheduler
from pipeline.cluster.shards import Shard
from pipeline.cluster.tree import groups_of, sum_in_tree
from pipeline.editing.update import Change, Update, output_change
from pipeline.errors import DivergedError, JobFailedError
from pipeline.methods import first_of_each_value, wraps_updates
from pipeline.results.keys import StoredKeys, read_keys, write_keys
from pipeline.results.store import RunStore
from pipeline.results.updates import read_update, write_update
from pipeline.spec import JobSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Insertion:
    """Writes the values of one round after another into the weights.

    Attributes:
        spec: the resolved spec.
        scheduler: reaches the workers and the reducer.
        store: the run.
        covariances: C of every edited layer; None where the run holds all updates.
        worker: names the edited weights.
        progress: shows how far it is.
        past: what the method remembers of past rounds; None if it does not.
    """

    spec: JobSpec
    scheduler: Scheduler
    store: RunStore
    covariances: Covariances | None
    worker: WorkerDescription
    progress: PhaseProgress
    past: PastGrams | None

    def insert(self, shards: list[Shard], round: int, layers: tuple[int, ...]) -> None:
        """Write the values of a round's stage, in ascending order of its layers.

        Updates that the run holds already are applied as they are.

        Args:
            shards: what has values, by the numbers of their parts.
            round: the round.
            layers: the stage.

        Raises:
            JobFailedError: a layer's equations cannot be solved, or the reducer keeps dying.
            DivergedError: an update would ruin the model; it reached no weight and no file.
        """
        stored = self.store.layers("update", round)
        edits = sum(len(shard.items) for shard in shards)
        left = [layer for layer in layers if layer not in stored]
        total = len(layers) * edits
        with self.progress.phase("insertion", total, total - len(left) * edits) as ticker:
            values = self._values(shards, round) if left and edits else None
            if values is not None and "merge" in self.spec.method.wrappers:
                shards = [
                    Shard(shard.index, first_of_each_value(shard.items, values.z))
                    for shard in shards
                ]
            for layer in layers:
                if layer in left:
                    self._insert_layer(shards, values, layer, round)
                    ticker.advance(edits)
                else:
                    self._apply_stored(layer, round)

    def _values(self, shards: list[Shard], round: int) -> "_Values":
        parts = {shard.index for shard in shards}
        return _Values.of(self.store.read_parts("values", round, parts))

    def _insert_layer(
        self, shards: list[Shard], values: "_Values | None", layer: int, round: int
    ) -> None:
        assert self.covariances is not None
        if values is None:
            update, keys = self._nothing(layer)
        else:
            update, keys = self._solve_layer(shards, values.z, layer)
            if wraps_updates(self.spec.method):
                version = self.scheduler.version
                update = self.scheduler.call("wrap_update", layer, update, version=version)
            _check(self.spec, update, self.covariances.matrices[layer], values.hidden_norm, layer)
        if keys is not None:
            # Before the update, whose presence says that the layer is done.
            write_keys(self.store, keys, round=round, layer=layer)
        write_update(
            self.store,
            round=round,
            layer=layer,
            weight_name=self.worker.weight_names[layer],
            update=update,
            metadata=self._described(update),
        )
        self._apply(layer, update, round)
        if self.past is not None:
            assert keys is not None
            self.past.add(layer, keys.keys_NF)

    def _described(self, update: Update) -> dict[str, str]:
        """What an update's file says of it."""
        rank = {} if update.rank is None else {"rank": str(update.rank)}
        return {
            "method": self.spec.method.name,
            "fingerprint": self.worker.fingerprint,
            **rank,
        }

    def _apply_stored(self, layer: int, round: int) -> None:
        path = self.store.layers("update", round)[layer]
        self._apply(layer, read_update(path)[1], round)
        if self.past is not None:
            self.past.add(layer, read_keys(self.store.layers("keys", round)[layer]).keys_NF)

    def _apply(self, layer: int, update: Change, round: int) -> None:
        path = self.store.layers("update", round)[layer]
        self.scheduler.apply(layer, update, reload=lambda: read_update(path)[1])

    def _nothing(self, layer: int) -> tuple[Update, StoredKeys | None]:
        """The update of a round in which no request has a value: rank 0, so that versions count."""
        sizes = self.worker.hidden_size, self.worker.key_sizes[layer]
        keys = StoredKeys((), torch.zeros(0, sizes[1]), torch.zeros(0, sizes[0]))
        return Update.of(torch.zeros(sizes[0], 0), torch.zeros(0, sizes[1])), keys

    def _solve_layer(
        self, shards: list[Shard], values: dict[str, Tensor], layer: int
    ) -> tuple[Update, StoredKeys | None]:
        retries = self.spec.cluster.max_retries
        for attempt in range(retries + 1):
            try:
                return self._merge(shards, values, layer)
            except WorkerLostError as error:
                log.warning("layer %d: the reducer was lost (%s); merging again", layer, error)
                if attempt == retries:
                    raise JobFailedError(
                        f"layer {layer}: the reducer keeps dying: {error}"
                    ) from error
            except ValueError as error:
                raise JobFailedError(f"layer {layer}: {error}") from error
        raise AssertionError("unreachable")

    def _merge(
        self, shards: list[Shard], values: dict[str, Tensor], layer: int
    ) -> tuple[Update, StoredKeys | None]:
        """Bring shards of keys and residuals to the reducer, which adds them in the plan's order.

        Of very many edits their sums travel (see `pipeline.cluster.tree`). Keys that are to be kept
        come to the driver too.
        """
        assert self.covariances is not None
        engine = self.scheduler.engine
        order = {shard.index: place for place, shard in enumerate(shards)}
        num_edits = sum(len(shard.items) for shard in shards)
        is_kept = self._keeps_keys(num_edits, layer)
        past = None if self.past is None else self.past.of(layer)
        engine.reduce("begin", layer, self.covariances.matrices[layer], num_edits, past)
        outcomes = self.scheduler.run(
            "read_keys",
            shards,
            lambda shard, items: (
                shard.index,
                items,
                torch.stack([values[request.case_id] for request in items]),
                layer,
            ),
            # A request that has a value has keys; what fails here is not one request's fault.
            split=False,
            version=self.scheduler.version,
        )
        groups = groups_of(shards, self.worker.key_sizes[layer])
        in_tree = len(groups) < len(shards)
        references: dict[int, Any] = {}
        measured: dict[int, tuple[Tensor, Tensor]] = {}
        for outcome in outcomes:
            place, reference = order[outcome.shard.index], outcome.done[0].reference
            if in_tree:
                references[place] = reference
            else:
                engine.reduce("add", place, reference)
            if is_kept:
                measured[place] = engine.fetch(reference)
        if in_tree:
            sums = sum_in_tree(engine, groups, references)
            for place, reference in enumerate(sums):
                engine.reduce("add", place, reference)
        update: Update = engine.reduce("solve", len(sums) if in_tree else len(shards))
        return update, _in_one(shards, measured) if measured else None

    def _keeps_keys(self, num_edits: int, layer: int) -> bool:
        """Whether the run keeps what a layer's update is solved from (`output.keep_keys`)."""
        if self.spec.rounds is not None:
            return True
        asked = self.spec.output.keep_keys
        if asked != "auto":
            return asked
        inputs, outputs = self.worker.key_sizes[layer], self.worker.hidden_size
        return num_edits * (inputs + outputs) <= inputs * outputs


def _in_one(shards: list[Shard], measured: dict[int, tuple[Tensor, Tensor]]) -> StoredKeys:
    """The keys and residuals of all shards, in the plan's order."""
    keys, residuals = zip(*(measured[place] for place in sorted(measured)), strict=True)
    case_ids = tuple(request.case_id for shard in shards for request in shard.items)
    return StoredKeys(case_ids, torch.cat(keys), torch.cat(residuals))


@dataclass(frozen=True)
class _Values:
    """A round's values: case_id -> z (D,) float32, and the mean length of h0."""

    z: dict[str, Tensor]
    hidden_norm: float

    @classmethod
    def of(cls, table: pa.Table) -> "_Values":
        """From the rows of values/, at least one."""
        rows = table.combine_chunks()
        flat = rows["z"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        matrix = torch.from_numpy(np.array(flat).reshape(rows.num_rows, -1))
        z = dict(zip(rows["case_id"].to_pylist(), matrix, strict=True))
        return cls(z, pc.mean(table["initial_norm"]).as_py())


def _check(
    spec: JobSpec, update: Update, covariance_FF: Tensor, hidden_norm: float, layer: int
) -> None:
    """Refuse an update that ruins the model before it reaches a weight, and report a ridge."""
    if not all(bool(torch.isfinite(part).all()) for part in update.parts.values()):
        raise DivergedError(f"layer {layer}: the update holds infinities or NaNs")
    if update.ridge:
        log.warning(
            "layer %d: the normal equations were singular; a ridge of %.3g was added. More"
            " covariance samples would avoid it",
            layer,
            update.ridge,
        )
    drift = output_change(update, covariance_FF) / hidden_norm
    log.info("layer %d: ordinary tokens drift by %.3g of a hidden state", layer, drift)
    # Written so that a drift that is not a number is caught too.
    if not drift <= spec.method.max_drift:
        stop_or_warn(
            spec,
            f"layer {layer}: the update moves ordinary tokens by {drift:.3g} times a hidden state,"
            f" more than method.max_drift {spec.method.max_drift:g}; raise"
            " method.covariance_weight, or edit fewer facts at once",
        )
