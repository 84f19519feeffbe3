"""Who works: workers that are there, and those that start late or anew and are brought up to date.

A worker that is lost is asked for again and the others go on without it; so they do without one for
which there is no node yet. See docs/design.md, "Workers that come and go".
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.cluster.engine import Call, Engine, WorkerLostError
from pipeline.cluster.waiting import Waiter
from pipeline.errors import EditfleetError, JobFailedError

log = logging.getLogger(__name__)

_SAY_SECONDS = 30.0

# A call that all workers have had: its method and arguments, made anew for each that comes.
Told = Callable[[], tuple[str, tuple[Any, ...], dict[str, Any]]]


class Roster:
    """Workers of an engine that can be called, and those that are starting.

    Args:
        engine: where they live.
        waiter: waits for its calls.
        max_retries: times that a start may be lost, one after another, before the job ends.
        absent: workers that were asked for and have not answered yet.

    Attributes:
        present: numbers of the workers that are there and up to date.
    """

    def __init__(
        self, engine: Engine, waiter: Waiter, max_retries: int, absent: Iterable[int]
    ) -> None:
        self.engine, self.waiter, self.max_retries = engine, waiter, max_retries
        self.present = set(range(engine.num_workers)) - set(absent)
        self._history: list[Told] = []
        self._starting: dict[Call, int] = {}
        self._losses: Counter[int] = Counter()
        self._say_at_age = _SAY_SECONDS
        for worker in sorted(absent):
            self._ask(worker)

    @property
    def absent(self) -> frozenset[int]:
        """Numbers of the workers that are starting."""
        return frozenset(self._starting.values())

    def remember(self, told: Told) -> None:
        """Note what all present workers are told, for those that come later, in this order."""
        self._history.append(told)

    def remember_only(self, history: Sequence[Told]) -> None:
        """Note this in the place of all that was noted before."""
        self._history = list(history)

    def lose(self, worker: int, error: WorkerLostError) -> None:
        """Ask for a lost worker again; until it is back it is not present.

        Raises:
            JobFailedError: it was lost at its start, more often than `max_retries` in a row.
        """
        if self._losses[worker] > self.max_retries:
            raise JobFailedError(f"worker {worker} does not start: {error}") from error
        log.warning(
            "worker %d was lost (%s); starting it again", worker, error, extra={"worker": worker}
        )
        self.present.discard(worker)
        self._losses[worker] += 1
        self.engine.restart(worker)
        self._ask(worker)

    def wait(self, method: str, out: Mapping[Call, str], at_most: float = math.inf) -> list[Call]:
        """Wait until calls have ended, as `Waiter.wait` does, or a worker has come.

        Args:
            method: what was called.
            out: the calls, and what each is to be called in a message.
            at_most: seconds to wait.
        """
        deadline = time.monotonic() + at_most
        while True:
            left = min(deadline - time.monotonic(), self._seconds_to_say())
            ended = self.waiter.wait(method, out, list(self._starting), max(0.0, left))
            come = [call for call in ended if call in self._starting]
            for call in come:
                self._admit(call)
            self._say_who_is_missing()
            if ended or time.monotonic() >= deadline:
                return [call for call in ended if call not in come]

    def anyone(self, first: int = 0) -> int:
        """The lowest number of a present worker from `first` on, else of all, once there is one."""
        while not self.present:
            self.wait("start", {})
        return min(self.present, key=lambda worker: (worker < first, worker))

    def gather(self, patience: float) -> None:
        """Wait until all are present, or at least one is and no other has come for `patience`."""
        come = time.monotonic()
        while self._starting:
            before = len(self.present)
            self.wait("start", {}, patience)
            if len(self.present) > before:
                come = time.monotonic()
            elif self.present and time.monotonic() - come >= patience:
                return

    def _ask(self, worker: int) -> None:
        self._starting[self.engine.submit(worker, "describe")] = worker

    def _admit(self, call: Call) -> None:
        """Bring a worker that has started to where the others are."""
        worker = self._starting.pop(call)
        try:
            self.engine.result(call)
            for told in self._history:
                method, args, kwargs = told()
                again = self.engine.submit(worker, method, *args, **kwargs)
                self.waiter.result(again, method)
        except WorkerLostError as error:
            self.lose(worker, error)
            return
        except EditfleetError as error:
            # Its node lacks something. That is the job's end only where nobody else can go on.
            if not (self.present and self._history):
                raise
            log.error(
                "worker %d cannot start (%s); going on without it",
                worker,
                error,
                extra={"worker": worker},
            )
            return
        del self._losses[worker]
        self.present.add(worker)
        if not self._starting:
            self._say_at_age = _SAY_SECONDS

    def _seconds_to_say(self) -> float:
        return self._say_at_age - self._age() if self._starting else math.inf

    def _say_who_is_missing(self) -> None:
        """Say it after half a minute, after twice that, and so on."""
        if self._seconds_to_say() > 0.0:
            return
        log.warning(
            "waiting for %d of %d workers since %.0f s; %s",
            len(self._starting),
            self.engine.num_workers,
            self._age(),
            self.engine.needs(),
        )
        self._say_at_age *= 2

    def _age(self) -> float:
        return max(call.age for call in self._starting)
