"""Engines: where workers and the reducer live. One in this process, one on a Ray cluster.

An engine only submits calls and hands back their results; retries, versions and order are the
scheduler's (scheduler.py).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pipeline.cluster.reducer import Reducer
from pipeline.cluster.worker import EditWorker
from pipeline.spec import JobSpec

KEPT_IN_PLACE = frozenset({"read_keys", "gradients", "contribute"})
"""Methods of a worker with a second, large result, which goes to the reducer, not to the driver."""


class WorkerLostError(Exception):
    """A call was lost with its worker, node or object: trying again can help."""


@dataclass(eq=False)
class Call:
    """A call under way. `reference` stands for a large second result that stays where it is."""

    worker: int
    handle: Any
    reference: Any = None
    sent: float = field(default_factory=time.monotonic)

    @property
    def age(self) -> float:
        """Seconds since it was sent."""
        return time.monotonic() - self.sent


class Engine(Protocol):
    """What the scheduler needs of the place where workers live."""

    num_workers: int
    late: frozenset[int]
    """Workers that were asked for and had not started when the engine was made."""

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        """Start a method of a worker; of one that is still to start, it waits for that."""
        ...

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        """Return at least one finished call, or none after `timeout` seconds."""
        ...

    def result(self, call: Call) -> Any:
        """Return a finished call's result.

        Raises:
            WorkerLostError: infrastructure failed.
            Exception: whatever the method raised.
        """
        ...

    def share(self, value: Any) -> Any:
        """Put a large value where every worker can read it once a node; pass it as an argument."""
        ...

    def combine(self, function: Callable[[Sequence[Any]], Any], references: Sequence[Any]) -> Any:
        """Apply a function to what references stand for, anywhere; a reference of the result."""
        ...

    def fetch(self, reference: Any) -> Any:
        """Bring what a reference stands for here (WorkerLostError as in `result`)."""
        ...

    def restart(self, worker: int) -> None:
        """Ask for a worker in a lost one's place; it starts with the unedited weights."""
        ...

    def needs(self) -> str:
        """What a worker asks for and what is free, for a message about those that do not start."""
        ...

    def reduce(self, method: str, *args: Any) -> Any:
        """Call the reducer and wait for its answer (WorkerLostError as in `result`)."""
        ...

    def lane(self, worker: int) -> AbstractContextManager["Engine"]:
        """An engine of this worker alone, with a reducer of its own, for a while."""
        ...

    def reducers_used(self) -> list[dict[str, Any]]:
        """What the calls to reducers took (`pipeline.cluster.usage`), where it is counted."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


@dataclass
class InProcessEngine:
    """One worker and the reducer as plain objects; a call runs when it is waited for."""

    spec: JobSpec
    num_workers: int = 1
    late: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self._worker = self._new_worker()
        threads = self.spec.cluster.reducer_threads
        with compute_threads(threads):
            self._reducer = Reducer(self.spec.method, threads)

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        """Remember a call."""
        return Call(worker, (method, args, kwargs))

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        """Say that the first call is ready; it runs when its result is asked for."""
        return list(calls[:1])

    def result(self, call: Call) -> Any:
        """Run the call."""
        method, args, kwargs = call.handle
        with compute_threads(self.spec.cluster.cpus_per_worker):
            result = self._do(method, *args, **kwargs)
        if method in KEPT_IN_PLACE:
            result, call.reference = result
        return result

    def share(self, value: Any) -> Any:
        """Hand the value on as it is."""
        return value

    def combine(self, function: Callable[[Sequence[Any]], Any], references: Sequence[Any]) -> Any:
        """Apply it here."""
        with compute_threads(self.spec.cluster.reducer_threads):
            return function(references)

    def fetch(self, reference: Any) -> Any:
        """Hand it on as it is."""
        return reference

    def restart(self, worker: int) -> None:
        """Make the worker anew."""
        self._worker = self._new_worker()

    def needs(self) -> str:
        """Nothing: a worker is there at once."""
        return "it needs this process only"

    def reduce(self, method: str, *args: Any) -> Any:
        """Call the reducer."""
        with compute_threads(self.spec.cluster.reducer_threads):
            return self._do_reduce(method, *args)

    def lane(self, worker: int) -> AbstractContextManager[Engine]:
        """This engine, which has one worker."""
        return nullcontext(self)

    def reducers_used(self) -> list[dict[str, Any]]:
        """It is not counted."""
        return []

    def close(self) -> None:
        """Nothing outlives this process."""

    def _do(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._worker, method)(*args, **kwargs)

    def _do_reduce(self, method: str, *args: Any) -> Any:
        return getattr(self._reducer, method)(*args)

    def _new_worker(self) -> EditWorker:
        threads = self.spec.cluster.cpus_per_worker
        with compute_threads(threads):
            return EditWorker(self.spec, threads)


# The count is the process's own, so studies that share a process take turns.
_COMPUTING = threading.RLock()


@contextmanager
def compute_threads(count: int) -> Iterator[None]:
    """Compute with so many threads for a while: they decide the last bits of a result."""
    with _COMPUTING:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)
