"""Progress: one bar a phase on a terminal, a line now and then in a job's log."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.watching import logs

if TYPE_CHECKING:
    from pipeline.results.mirror import Mirror
    from pipeline.watching.watch import Watch

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


class PhaseProgress:
    """Shows how far each phase is and keeps its seconds.

    Args:
        console: where to show; null shows nothing.
        study: name of one of several jobs that are shown together, as lines without bars.

    Attributes:
        seconds: by phase.
        watch: what is told of each phase.
        mirror: what keeps the run's URL as its copy here is; None where the run is a directory.
    """

    def __init__(self, console: Console | None = None, study: str = "") -> None:
        self.console, self.study = console, study
        self.seconds: dict[str, float] = {}
        self.watch: Watch | None = None
        self.mirror: Mirror | None = None
        self.label = ""
        """Put before the name of a phase; with one, bars go away once they are full."""

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each phase beyond those of an earlier time."""
        passed = {name: total - before.get(name, 0.0) for name, total in self.seconds.items()}
        return {name: round(seconds, 3) for name, seconds in passed.items() if seconds > 0.0}

    @contextmanager
    def phase(self, name: str, total: int, kept: int = 0) -> Iterator["Ticker"]:
        """Show and time one phase of `total` units, some of which were finished by an earlier run.

        A phase entered twice adds up.
        """
        start = time.perf_counter()
        ticker = self._ticker(name, total, kept)
        try:
            with logs.about(phase=name), ticker:
                yield ticker
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            if self.watch is not None:
                self.watch.phase_ended(name, elapsed)

    def say(self, text: str) -> None:
        """Show one line, on the terminal or in the log."""
        text = f"{self.study}: {text}" if self.study else text
        if self.console is not None and self.console.is_terminal:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self.console is not None:
            log.info("%s", text)

    def _ticker(self, name: str, total: int, kept: int) -> "Ticker":
        if self.console is None or (self.label and kept == total):
            return Ticker()
        if self.study:
            return _Lines(f"{self.study}: {self.label}{name}", total, kept)
        if self.console.is_terminal:
            return _Bar(self.console, self.label + name, total, kept, transient=bool(self.label))
        return _Lines(self.label + name, total, kept)


class Ticker:
    """Counts finished units; this one shows nothing."""

    def __enter__(self) -> "Ticker":
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def advance(self, units: int) -> None:
        """Count finished units."""


class _Bar(Ticker):
    def __init__(
        self, console: Console, name: str, total: int, kept: int, *, transient: bool
    ) -> None:
        self.progress = Progress(
            TextColumn(f"{name:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"({kept} kept)" if kept else ""),
            _RateColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=transient,
        )
        self.task = self.progress.add_task(name, total=total, completed=kept)

    def __enter__(self) -> Ticker:
        self.progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.progress.stop()

    def advance(self, units: int) -> None:
        self.progress.advance(self.task, units)


class _RateColumn(ProgressColumn):
    """Units a second, those of an earlier run left out; blank before the first."""

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:,.1f}/s")


class _Lines(Ticker):
    def __init__(self, name: str, total: int, kept: int) -> None:
        self.name, self.total, self.kept, self.done = name, total, kept, kept
        self.start = self.said = time.perf_counter()

    def __enter__(self) -> Ticker:
        if self.kept:
            log.info("%s: %d of %d kept from before", self.name, self.kept, self.total)
        return self

    def advance(self, units: int) -> None:
        self.done += units
        now = time.perf_counter()
        if self.done < self.total and now - self.said < _SECONDS_BETWEEN_LINES:
            return
        self.said = now
        elapsed = max(now - self.start, 1e-9)
        done = self.done - self.kept
        left = elapsed * (self.total - self.done) / max(1, done)
        log.info(
            "%s: %d of %d, %.1f a second, %.0f s left",
            self.name,
            self.done,
            self.total,
            done / elapsed,
            left,
        )
