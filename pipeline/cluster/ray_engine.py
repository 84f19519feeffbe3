"""The Ray engine: worker and reducer actors on this machine or on a cluster."""

import logging
import os
import signal
import socket
import threading
from typing import Any

import ray

from pipeline.cluster.engine import WorkerLostError
from pipeline.cluster.gpus import settled
from pipeline.cluster.ray_calls import RayCalls, fetch, first_line
from pipeline.cluster.ray_gpus import find_gpus, node_gpus
from pipeline.cluster.reducer import Reducer
from pipeline.cluster.worker import EditWorker
from pipeline.errors import InputError, JobFailedError
from pipeline.spec import ClusterSpec, JobSpec

log = logging.getLogger(__name__)

_START_SECONDS = 30.0
_KNOCK_SECONDS = 10.0
# Ray's own share of this machine's memory; updates and shards are megabytes, not gigabytes.
_LOCAL_OBJECT_STORE_BYTES = 1_000_000_000


class RayEngine(RayCalls):
    """Workers and reducer as actors, restarted by us and never by Ray (docs/design.md).

    Args:
        spec: the resolved spec.

    Raises:
        InputError: a worker cannot be made from this spec (a bad model path, say), or no cluster
            answers at the address.
        JobFailedError: workers cannot start for another reason.
    """

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
            self.num_workers = _num_workers(self.spec.cluster, self._actor_options["num_gpus"])
            self._workers = [self._new_worker() for _ in range(self.num_workers)]
            self._reducer = self._new_reducer()
            self._await_start()
        except BaseException:
            self.close()
            raise

    def restart(self, worker: int) -> None:
        """Kill what is left of a worker and start a new one in its place."""
        ray.kill(self._workers[worker])
        self._workers[worker] = self._new_worker()

    def close(self) -> None:
        """End all actors, and the cluster if this engine started it."""
        for actor in [*self._workers, self._reducer]:
            if actor is not None:
                ray.kill(actor)
        self._workers, self._reducer = [], None
        if self._owns_cluster:
            ray.shutdown()

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

    def _await_start(self) -> None:
        """Wait for all workers, however long an autoscaler takes, and say what is missing."""
        waiting = {worker.describe.remote(): i for i, worker in enumerate(self._workers)}
        seconds, lost = 0.0, 0
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=_START_SECONDS)
            for handle in done:
                worker = waiting.pop(handle)
                try:
                    fetch(handle)
                except WorkerLostError as error:
                    lost += 1
                    if lost > self.spec.cluster.max_retries:
                        raise JobFailedError(f"a worker did not start: {error}") from error
                    log.warning(
                        "worker %d was lost at its start (%s); starting it again", worker, error
                    )
                    self.restart(worker)
                    waiting[self._workers[worker].describe.remote()] = worker
            if not done:
                seconds += _START_SECONDS
                log.warning(
                    "waiting for %d of %d workers since %.0f s; each asks for %s, free are %s",
                    len(waiting),
                    self.num_workers,
                    seconds,
                    {k: v for k, v in self._actor_options.items() if k.startswith("num_")},
                    {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")},
                )


def new_reducer(spec: JobSpec) -> Any:
    """Start a reducer. It works while the workers wait, so it asks for no processor of its own."""
    actor = ray.remote(Reducer).options(num_cpus=0, max_restarts=0, max_task_retries=0)
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
    return {"num_cpus": cluster.cpus_per_worker, "num_gpus": 0 if gpus == "auto" else gpus}


def _num_workers(cluster: ClusterSpec, gpus: float) -> int:
    if cluster.workers != "auto":
        return cluster.workers
    resources = ray.cluster_resources()
    by_cpu = int(resources.get("CPU", 1) // cluster.cpus_per_worker)
    # A worker's GPUs are all of one node. (1 / 0.1 may be a little less than 10.)
    on_nodes = (int(count / gpus + 1e-9) for count in node_gpus()) if gpus else ()
    by_gpu = sum(on_nodes) if gpus else by_cpu
    return max(1, min(by_cpu, by_gpu))
