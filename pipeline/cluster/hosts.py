"""Engines of studies that run side by side on the same workers, inside this process."""

import threading
from collections.abc import Sequence
from typing import Any

from pipeline.cluster.engine import InProcessEngine, compute_threads
from pipeline.cluster.host import WorkerHost
from pipeline.cluster.usage import Usage
from pipeline.spec import JobSpec


class StudiesEnded(BaseException):
    """Raised in the thread of a study when all of them are to end."""


class InProcessHosts:
    """One worker that all studies share; a call runs when it is waited for.

    Args:
        specs: resolved specs, of one model.
        at_once: how many of them are under way at the same time.
    """

    def __init__(self, specs: Sequence[JobSpec], at_once: int) -> None:
        self.ended = threading.Event()
        self.specs = tuple(specs)
        threads = self.specs[0].cluster.cpus_per_worker
        with compute_threads(threads):
            self.host = WorkerHost(self.specs, threads, at_once)

    def engine(self, study: int) -> InProcessEngine:
        """The engine of one study, by its place among the specs."""
        return _InProcessGuest(self, study)

    def close(self) -> None:
        """Nothing outlives this process."""


class _InProcessGuest(InProcessEngine):
    """One study's way to the shared worker; its reducer is its own."""

    def __init__(self, hosts: InProcessHosts, study: int) -> None:
        self._hosts, self._study = hosts, study
        super().__init__(hosts.specs[study])
        self._usage = Usage()

    def close(self) -> None:
        """The worker goes on with the other studies, between whose calls this one ends."""
        with compute_threads(self.spec.cluster.cpus_per_worker):
            self._hosts.host.end(self._study)

    def reducers_used(self) -> list[dict[str, Any]]:
        """What the calls to the reducer took."""
        return [self._usage.as_dict()]

    def _new_worker(self) -> Any:
        return None  # the hosts have it

    def _do_reduce(self, method: str, *args: Any) -> Any:
        # Here, where the others' turns are over, and not in `reduce`.
        with self._usage.counted():
            return super()._do_reduce(method, *args)

    def _do(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self._hosts.ended.is_set():
            raise StudiesEnded
        return self._hosts.host.call(self._study, method, *args, **kwargs)
