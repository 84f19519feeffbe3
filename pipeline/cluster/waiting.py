"""Waiting for calls: saying which stall, and giving up those that never answer."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.cluster.engine import Call, Engine, WorkerLostError

log = logging.getLogger(__name__)


class Waiter:
    """Waits for calls to an engine's workers.

    Args:
        engine: where the workers live.
        stall_seconds: say what has been out for longer than this.
        call_timeout_seconds: take a worker for lost that has not answered for this long.
    """

    def __init__(
        self, engine: Engine, stall_seconds: float, call_timeout_seconds: float | None
    ) -> None:
        self.engine = engine
        self.stall_seconds = stall_seconds
        self.call_timeout_seconds = call_timeout_seconds
        self._said = time.monotonic()

    def wait(
        self,
        method: str,
        out: Mapping[Call, str],
        beside: Sequence[Call] = (),
        at_most: float = math.inf,
    ) -> list[Call]:
        """Wait until calls are finished or overdue, which `fetch` tells apart.

        Args:
            method: what was called.
            out: the calls, and what each is to be called in a message.
            beside: calls that may take any time, and are never late or overdue.
            at_most: seconds to wait.
        """
        deadline = time.monotonic() + at_most
        while True:
            seconds = min(self._patience(out), max(0.0, deadline - time.monotonic()))
            done = self.engine.wait([*beside, *out], seconds)
            left = [call for call in out if call not in done]
            self._report(method, {call: out[call] for call in left if self._is_late(call)})
            overdue = [call for call in left if self._is_overdue(call)]
            if done or overdue or time.monotonic() >= deadline:
                return done + overdue

    def fetch(self, call: Call) -> Any:
        """Return the result of a call that `wait` returned.

        Raises:
            WorkerLostError: infrastructure failed, or the call is overdue.
        """
        if self._is_overdue(call) and not self.engine.wait([call], 0.0):
            raise WorkerLostError(
                f"no answer for {call.age:.0f} s, longer than cluster.call_timeout_seconds"
            )
        return self.engine.result(call)

    def result(self, call: Call, method: str) -> Any:
        """Wait for one call and return its result (WorkerLostError as in `fetch`)."""
        self.wait(method, {call: method})
        return self.fetch(call)

    def _patience(self, out: Iterable[Call]) -> float:
        """Seconds until something is to be said or done about the oldest call."""
        oldest, stall = max((call.age for call in out), default=0.0), self.stall_seconds
        seconds = stall - oldest if oldest < stall else stall
        if self.call_timeout_seconds is not None:
            seconds = min(seconds, max(0.0, self.call_timeout_seconds - oldest))
        return seconds

    def _is_late(self, call: Call) -> bool:
        return call.age >= self.stall_seconds

    def _is_overdue(self, call: Call) -> bool:
        return self.call_timeout_seconds is not None and call.age >= self.call_timeout_seconds

    def _report(self, method: str, late: Mapping[Call, str]) -> None:
        """Name what is late, at most once in `stall_seconds`."""
        now = time.monotonic()
        if not late or now - self._said < self.stall_seconds:
            return
        self._said = now
        names = (f"{name} on worker {c.worker} for {c.age:.0f} s" for c, name in late.items())
        log.warning("%s: no answer yet from %s", method, ", ".join(names))
