"""Calls to Ray actors, and which of Ray's errors mean that something was lost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from pipeline.cluster.engine import KEPT_IN_PLACE, Call, Engine, WorkerLostError
from pipeline.errors import InputError, JobFailedError
from pipeline.spec import JobSpec

_LOST = (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)


class RayCalls:
    """The calls of an engine to worker actors and a reducer that somebody has started."""

    spec: JobSpec
    num_workers: int
    late: frozenset[int]
    _workers: list[Any]
    _reducer: Any

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        """Start a method; what is `KEPT_IN_PLACE` stays in the object store."""
        bound, first = self._bound(worker, method)
        if method in KEPT_IN_PLACE:
            handle, reference = bound.options(num_returns=2).remote(*first, *args, **kwargs)
            return Call(worker, handle, reference)
        return Call(worker, bound.remote(*first, *args, **kwargs))

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        """Wait for one call."""
        by_handle = {call.handle: call for call in calls}
        done, _ = ray.wait(list(by_handle), num_returns=1, timeout=timeout)
        return [by_handle[handle] for handle in done]

    def result(self, call: Call) -> Any:
        """Fetch a finished call's result."""
        return fetch(call.handle)

    def share(self, value: Any) -> Any:
        """Put a value into the object store once."""
        return ray.put(value)

    def combine(self, function: Callable[[Sequence[Any]], Any], references: Sequence[Any]) -> Any:
        """Apply a function in a task of its own, near its arguments as a rule."""
        # It works while the workers wait, as the reducer does.
        task = ray.remote(_combined).options(num_cpus=0, max_retries=self.spec.cluster.max_retries)
        return task.remote(function, self.spec.cluster.reducer_threads, *references)

    def fetch(self, reference: Any) -> Any:
        """Get an object from the store."""
        return fetch(reference, self.spec.cluster.call_timeout_seconds)

    def reduce(self, method: str, *args: Any) -> Any:
        """Call the reducer and wait; a lost reducer is replaced before the error goes on."""
        try:
            handle = self._reducing(self._reducer, method, *args)
            return fetch(handle, self.spec.cluster.call_timeout_seconds)
        except WorkerLostError:
            ray.kill(self._reducer)
            self._reducer = self._new_reducer()
            raise

    def reducers_used(self) -> list[dict[str, Any]]:
        """It is not counted."""
        return []

    @contextmanager
    def lane(self, worker: int) -> Iterator[Engine]:
        """An engine of this worker alone, with a reducer of its own, for a while."""
        lane = RayLane(self, worker)
        try:
            yield lane
        finally:
            lane.close()

    def restart(self, worker: int) -> None:
        """Replace a lost worker."""
        raise NotImplementedError

    def needs(self) -> str:
        """What a worker asks for and what is free."""
        raise NotImplementedError

    def _bound(self, worker: int, method: str) -> tuple[Any, tuple[Any, ...]]:
        """The actor's method that stands for a worker's, and what comes before its arguments."""
        return getattr(self._workers[worker], method), ()

    def _reducing(self, reducer: Any, method: str, *args: Any) -> Any:
        """Start a method of a reducer."""
        return getattr(reducer, method).remote(*args)

    def _new_reducer(self) -> Any:
        raise NotImplementedError

    def _end_reducer(self, reducer: Any) -> None:
        """Called with a reducer that is needed no more."""
        ray.kill(reducer)


class RayLane(RayCalls):
    """One worker of an engine, for work that needs no other, with a reducer of its own.

    Args:
        engine: whose worker it is.
        worker: its number there; here it is 0.
    """

    num_workers = 1
    late: frozenset[int] = frozenset()

    def __init__(self, engine: RayCalls, worker: int) -> None:
        self._engine, self._worker = engine, worker
        self.spec = engine.spec
        self._reducer = self._new_reducer()

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        """Start a method."""
        call = self._engine.submit(self._worker, method, *args, **kwargs)
        return replace(call, worker=worker)

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        """Wait for one call."""
        return self._engine.wait(calls, timeout)

    def restart(self, worker: int) -> None:
        """Replace the worker if it is lost."""
        self._engine.restart(self._worker)

    def needs(self) -> str:
        """As of the engine."""
        return self._engine.needs()

    def close(self) -> None:
        """End the reducer; the worker is the engine's."""
        self._engine._end_reducer(self._reducer)

    def _reducing(self, reducer: Any, method: str, *args: Any) -> Any:
        return self._engine._reducing(reducer, method, *args)

    def _new_reducer(self) -> Any:
        return self._engine._new_reducer()


def _combined(function: Callable[[Sequence[Any]], Any], threads: int, *parts: Any) -> Any:
    torch.set_num_threads(threads)
    return function(parts)


def fetch(handle: Any, timeout: float | None = None) -> Any:
    """Get an object; errors of ours come back as they were raised, lost ones as WorkerLostError."""
    try:
        return ray.get(handle, timeout=timeout)
    except RayActorError as error:
        cause = _cause_of_start_failure(error)
        if cause is not None:
            raise cause from error
        raise WorkerLostError(first_line(error)) from error
    except _LOST as error:
        raise WorkerLostError(first_line(error)) from error
    except RayTaskError as error:
        if isinstance(error.cause, _LOST):
            raise WorkerLostError(first_line(error.cause)) from error
        raise error.cause from error


def _cause_of_start_failure(error: RayActorError) -> Exception | None:
    """The error that a worker's own constructor raised: it would fail on every worker."""
    if not getattr(error, "actor_init_failed", False):
        return None
    text = str(error).strip()
    for line in reversed(text.splitlines()):
        name, _, message = line.strip().partition(": ")
        if name.startswith("pipeline.errors."):
            return InputError(message)
    return JobFailedError(f"a worker cannot start: {text.splitlines()[-1]}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
