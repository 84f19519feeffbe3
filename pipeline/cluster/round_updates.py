"""Updates that are made for all layers of a round at once: checked, stored, then applied."""

import logging
from collections.abc import Sequence

from pipeline.cluster.calls.base import WorkerDescription
from pipeline.cluster.scheduler import Scheduler
from pipeline.editing.update import Change
from pipeline.errors import DivergedError
from pipeline.methods import wraps_updates
from pipeline.results.store import RunStore
from pipeline.results.updates import read_update, write_update
from pipeline.spec import MethodSpec

log = logging.getLogger(__name__)


def finished_update(scheduler: Scheduler, method: MethodSpec, layer: int, update: Change) -> Change:
    """A change as it is stored: passed through the method's wrappers, on the weights as they are.

    Raises:
        DivergedError: it is not finite.
    """
    if wraps_updates(method):
        update = scheduler.call("wrap_update", layer, update, version=scheduler.version)
    if not all(bool(part.isfinite().all()) for part in update.parts.values()):
        raise DivergedError(f"layer {layer}: the update holds infinities or NaNs")
    return update


def store_update(
    store: RunStore,
    worker: WorkerDescription,
    method: MethodSpec,
    *,
    round: int,
    layer: int,
    update: Change,
) -> None:
    """Write a finished update."""
    log.info("layer %d: the update's norm is %.3g", layer, update.norm())
    write_update(
        store,
        round=round,
        layer=layer,
        weight_name=worker.weight_names[layer],
        update=update,
        metadata={"method": method.name, "fingerprint": worker.fingerprint},
    )


def apply_stored(scheduler: Scheduler, store: RunStore, layers: Sequence[int], round: int) -> None:
    """Bring a round's stored updates to every worker, in the order of layers."""
    for layer in layers:
        path = store.layers("update", round)[layer]
        update = read_update(path)[1]
        scheduler.apply(layer, update, reload=lambda p=path: read_update(p)[1])  # type: ignore[misc]
