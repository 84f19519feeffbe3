"""Engines of studies that run side by side on the same Ray workers."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import ray

from pipeline.cluster.engine import Call, WorkerLostError
from pipeline.cluster.gpus import settled
from pipeline.cluster.host import ReducerHost, WorkerHost
from pipeline.cluster.hosts import StudiesEnded
from pipeline.cluster.ray_calls import RayCalls, fetch
from pipeline.cluster.ray_engine import RayEngine
from pipeline.cluster.ray_gpus import find_gpus, node_gpus
from pipeline.spec import JobSpec

# A study notices within this time that all of them are to end.
_LOOK_SECONDS = 0.5


class RayHosts(RayEngine):
    """Workers that serve all studies, each through an engine of its own.

    Args:
        specs: resolved specs, of one model and one `cluster`.
        at_once: how many of them are under way at the same time.

    Raises:
        InputError, JobFailedError: as of `RayEngine`.
    """

    def __init__(self, specs: Sequence[JobSpec], at_once: int) -> None:
        self.specs, self._at_once = tuple(specs), at_once
        self.ended = threading.Event()
        self._renewing = threading.Lock()
        self._free_reducers: list[Any] = []
        super().__init__(self.specs[0])

    def engine(self, study: int) -> "RayGuest":
        """The engine of one study, by its place among the specs."""
        return RayGuest(self, study)

    def workers(self) -> list[Any]:
        """The actors as they are now."""
        return list(self._workers)

    def renew(self, worker: int, lost: Any) -> Any:
        """Replace a lost actor unless another study has done so already; return the new one."""
        with self._renewing:
            if self._workers[worker] is lost:
                self.restart(worker)
            return self._workers[worker]

    def _new_worker(self) -> Any:
        actor = ray.remote(WorkerHost).options(
            max_restarts=0, max_task_retries=0, **self._actor_options
        )
        # The first one says how many GPUs there are.
        specs = (self.spec, *self.specs[1:])
        return actor.remote(specs, self.spec.cluster.cpus_per_worker, self._at_once)

    def lend_reducer(self, spec: JobSpec) -> Any:
        """A reducer for a study: one that another study has given back, or a new one."""
        try:
            actor = self._free_reducers.pop()
        except IndexError:
            # It works while the workers wait, so it asks for no processor of its own.
            options = {"num_cpus": 0, "num_gpus": spec.cluster.reducer_gpus or 0}
            options |= {"max_restarts": 0, "max_task_retries": 0}
            actor = ray.remote(ReducerHost).options(**options).remote()
        actor.serve.remote(spec.method, spec.cluster.reducer_threads)
        return actor

    def take_back(self, reducer: Any) -> None:
        """Keep a reducer for the next study."""
        self._free_reducers.append(reducer)

    def close(self) -> None:
        """End all actors, and the cluster if this engine started it."""
        for reducer in self._free_reducers:
            ray.kill(reducer)
        self._free_reducers = []
        super().close()

    def _settle_gpus(self) -> JobSpec:
        return settled(self.spec, find_gpus, studies=self.specs) if node_gpus() else self.spec

    def _new_reducer(self) -> Any:
        return None  # every study has its own


class RayGuest(RayCalls):
    """One study's way to the shared workers; its reducer is its own.

    It keeps the actors that it knows: of one that another study has replaced, it learns by losing
    a call to the old one, and then brings its own weights there up to date.
    """

    def __init__(self, hosts: RayHosts, study: int) -> None:
        self._hosts, self._study = hosts, study
        self.spec = hosts.specs[study]
        self.num_workers, self.late = hosts.num_workers, hosts.late
        self._workers = hosts.workers()
        self._used: list[dict[str, Any]] = []
        self._reducer = self._new_reducer()

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        """Start a method."""
        self._require_going_on()
        return super().submit(worker, method, *args, **kwargs)

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        """Wait for one call, and look now and then whether the study is to end."""
        deadline = time.monotonic() + timeout
        while True:
            self._require_going_on()
            left = max(0.0, deadline - time.monotonic())
            done = super().wait(calls, min(left, _LOOK_SECONDS))
            if done or left <= _LOOK_SECONDS:
                return done

    def reduce(self, method: str, *args: Any) -> Any:
        """Call the reducer and wait."""
        self._require_going_on()
        return super().reduce(method, *args)

    def restart(self, worker: int) -> None:
        """Take the actor that has come in the place of a lost one."""
        self._require_going_on()
        self._workers[worker] = self._hosts.renew(worker, self._workers[worker])

    def reducers_used(self) -> list[dict[str, Any]]:
        """What the calls to its reducers took, those of its lanes included."""
        return [*self._used, fetch(self._reducer.used.remote())]

    def needs(self) -> str:
        """As of all studies' engine."""
        return self._hosts.needs()

    def close(self) -> None:
        """Give the reducer back and let the workers, which are everybody's, forget the study."""
        for worker in self._workers:
            worker.end.remote(self._study)
        self._end_reducer(self._reducer)

    def _bound(self, worker: int, method: str) -> tuple[Any, tuple[Any, ...]]:
        return self._workers[worker].call, (self._study, method)

    def _reducing(self, reducer: Any, method: str, *args: Any) -> Any:
        return reducer.call.remote(method, *args)

    def _new_reducer(self) -> Any:
        return self._hosts.lend_reducer(self.spec)

    def _end_reducer(self, reducer: Any) -> None:
        try:
            self._used.append(fetch(reducer.used.remote()))
        except WorkerLostError:
            return  # with what it had counted
        self._hosts.take_back(reducer)

    def _require_going_on(self) -> None:
        if self._hosts.ended.is_set():
            raise StudiesEnded
