"""Progress: one bar a phase on a terminal, a line now and then in a job's log."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


class PhaseProgress:
    """Shows how far each phase is and keeps its seconds.

    Args:
        console: where to show; null shows nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator["Ticker"]:
        """Show and time one phase of `total` units; a phase entered twice adds up."""
        start = time.perf_counter()
        ticker = self._ticker(name, total)
        try:
            with ticker:
                yield ticker
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed

    def _ticker(self, name: str, total: int) -> "Ticker":
        if self.console is None:
            return Ticker()
        if self.console.is_terminal:
            return _Bar(self.console, name, total)
        return _Lines(name, total)


class Ticker:
    """Counts finished units; this one shows nothing."""

    def __enter__(self) -> "Ticker":
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def advance(self, units: int) -> None:
        """Count finished units."""


class _Bar(Ticker):
    def __init__(self, console: Console, name: str, total: int) -> None:
        self.progress = Progress(
            TextColumn(f"{name:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(name, total=total)

    def __enter__(self) -> Ticker:
        self.progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.progress.stop()

    def advance(self, units: int) -> None:
        self.progress.advance(self.task, units)


class _Lines(Ticker):
    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.start = self.said = time.perf_counter()

    def advance(self, units: int) -> None:
        self.done += units
        now = time.perf_counter()
        if self.done < self.total and now - self.said < _SECONDS_BETWEEN_LINES:
            return
        self.said = now
        elapsed = max(now - self.start, 1e-9)
        left = elapsed * (self.total - self.done) / max(1, self.done)
        log.info(
            "%s: %d of %d, %.1f a second, %.0f s left",
            self.name,
            self.done,
            self.total,
            self.done / elapsed,
            left,
        )
