"""The Ray engine: worker and reducer actors on this machine or on a cluster."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any

import ray

from pipeline.cluster.gpus import settled
from pipeline.cluster.ray_calls import RayCalls, first_line
from pipeline.cluster.ray_gpus import find_gpus, node_gpus
from pipeline.cluster.reducer import Reducer
from pipeline.cluster.roster import Roster
from pipeline.cluster.waiting import Waiter
from pipeline.cluster.worker import EditWorker
from pipeline.errors import InputError
from pipeline.spec import ClusterSpec, JobSpec

log = logging.getLogger(__name__)

# A job begins without the workers that have not come this long after the last one that has.
_START_SECONDS = 30.0
_KNOCK_SECONDS = 10.0
# Ray's own share of this machine's memory; updates and shards are megabytes, not gigabytes.
_LOCAL_OBJECT_STORE_BYTES = 1_000_000_000


_RESOURCES = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
"""What an actor asks for, and what a node calls it."""
_GIGABYTE = 10**9


class RayEngine(RayCalls):
    """Workers and reducer as actors, restarted by us and never by Ray (docs/design.md).

    Args:
        spec: the resolved spec.

    Raises:
        InputError: a worker cannot be made from this spec (a bad model path, say), or no cluster
            answers at the address.
        JobFailedError: workers cannot start for another reason.
    """

    late: frozenset[int] = frozenset()

    def __init__(self, spec: JobSpec) -> None:
        self.spec = spec
        self._owns_cluster = not ray.is_initialized()
        _connect(spec.cluster)
        self._workers: list[Any] = []
        self._reducer: Any = None
        try:
            _require_size(spec.cluster)
            self.spec = self._settle_gpus()
            self._actor_options = _actor_options(self.spec.cluster)
            self.num_workers = _num_workers(self.spec.cluster, self._actor_options)
            self._workers = [self._new_worker() for _ in range(self.num_workers)]
            self._reducer = self._new_reducer()
            self.late = self._await_start()
        except BaseException:
            self.close()
            raise

    def restart(self, worker: int) -> None:
        """Kill what is left of a worker and start a new one in its place."""
        ray.kill(self._workers[worker])
        self._workers[worker] = self._new_worker()

    def needs(self) -> str:
        """Resources of a worker, and those that no actor holds."""
        available = ray.available_resources()
        asked = {k: _readable(k, v) for k, v in self._actor_options.items() if k in _RESOURCES}
        free = {
            name: _readable(option, available[name])
            for option, name in _RESOURCES.items()
            if option in self._actor_options and name in available
        }
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        large = sum(_room(node, self._actor_options) > 0 for node in nodes)
        return (
            f"each asks for {asked}, free are {free};"
            f" {large} of {len(nodes)} nodes are large enough for one"
        )

    def close(self) -> None:
        """End all actors, and the cluster if this engine started it."""
        for actor in [*self._workers, self._reducer]:
            if actor is not None:
                ray.kill(actor)
        self._workers, self._reducer = [], None
        if self._owns_cluster:
            ray.shutdown()

    def _await_start(self) -> frozenset[int]:
        """Wait for workers, however long an autoscaler takes; return those that are late."""
        cluster = self.spec.cluster
        waiter = Waiter(self, cluster.stall_seconds, None)
        roster = Roster(self, waiter, cluster.max_retries, range(self.num_workers))
        roster.gather(_START_SECONDS)
        if late := roster.absent:
            log.warning(
                "beginning with %d of %d workers, the others join when they have started; %s",
                len(roster.present),
                self.num_workers,
                self.needs(),
            )
        return late

    def _settle_gpus(self) -> JobSpec:
        """The spec with a number of GPUs a worker."""
        return settled(self.spec, find_gpus) if node_gpus() else self.spec

    def _new_worker(self) -> Any:
        actor = ray.remote(EditWorker).options(
            max_restarts=0, max_task_retries=0, **self._actor_options
        )
        return actor.remote(self.spec, self.spec.cluster.cpus_per_worker)

    def _new_reducer(self) -> Any:
        return new_reducer(self.spec)


def new_reducer(spec: JobSpec) -> Any:
    """Start a reducer. It works while the workers wait, so it asks for no processor of its own."""
    actor = ray.remote(Reducer).options(
        num_cpus=0,
        num_gpus=spec.cluster.reducer_gpus or 0,
        max_restarts=0,
        max_task_retries=0,
    )
    return actor.remote(spec.method, spec.cluster.reducer_threads)


def _connect(cluster: ClusterSpec) -> None:
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    # A submitted job finds the address of its cluster here.
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _knock(address)
            _init(address=address, **quiet)
        except (OSError, ValueError) as error:
            raise InputError(
                f"cluster.address: no Ray cluster answers at {address!r}, or it wants another token"
                f" ({first_line(error)}); start one with `ray start --head` and export"
                " RAY_AUTH_MODE=token for its drivers, or set the address to null"
            ) from error
        return
    # A cluster of its own has token authentication on, of which Ray would warn at every start.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    _init(
        address="local",
        num_cpus=_local_cpus(cluster),
        include_dashboard=False,
        object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        **quiet,
    )


def _init(**settings: Any) -> None:
    """`ray.init`, which puts a handler of SIGTERM of its own in the place of the process's."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**settings)
    except SystemExit as ended:
        if ended.code == signal.SIGTERM and callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _knock(address: str) -> None:
    """Open a connection to HOST:PORT and close it: Ray itself would try for minutes.

    Raises:
        OSError: nobody listens there.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _local_cpus(cluster: ClusterSpec) -> int:
    """Processors to announce: the machine's, or more when more workers are asked for."""
    asked = 0 if cluster.workers == "auto" else cluster.workers * cluster.cpus_per_worker
    return max(len(os.sched_getaffinity(0)), asked)


def _require_size(cluster: ClusterSpec) -> None:
    """Check that `auto` has nodes to go by: from none it would make one worker without a GPU."""
    auto = [name for name in ("workers", "gpus_per_worker") if getattr(cluster, name) == "auto"]
    if auto and not ray.cluster_resources().get("CPU"):
        raise InputError(
            f"cluster.{auto[0]}: the cluster has no processors yet, so `auto` has nothing to go by;"
            " give cluster.workers and cluster.gpus_per_worker, for an autoscaler to start them"
        )


def _actor_options(cluster: ClusterSpec) -> dict[str, Any]:
    gpus = cluster.gpus_per_worker
    # There are none where the number has not been settled.
    gpus = 0 if gpus == "auto" else gpus
    options: dict[str, Any] = {"num_cpus": cluster.cpus_per_worker, "num_gpus": gpus}
    if cluster.memory_per_worker_gb is not None:
        options["memory"] = int(cluster.memory_per_worker_gb * _GIGABYTE)
    return options


def _readable(option: str, amount: float) -> float | str:
    return f"{amount / _GIGABYTE:.1f} GB" if option == "memory" else amount


def _num_workers(cluster: ClusterSpec, options: Mapping[str, Any]) -> int:
    """Workers to start: as many as the spec says, or, for `auto`, as the nodes have room for."""
    if cluster.workers != "auto":
        return cluster.workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(1, sum(_room(node, options) for node in nodes))


def _room(node: Mapping[str, float], options: Mapping[str, Any]) -> int:
    """How many actors a node of these resources takes. Ray counts in ten-thousandths."""
    asked = {name: options.get(option) for option, name in _RESOURCES.items()}
    return min(
        round(node.get(name, 0.0) * 10_000) // round(amount * 10_000)
        for name, amount in asked.items()
        if amount
    )
