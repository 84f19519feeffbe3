"""Following a run until it ends: a table on a terminal, a line for every change elsewhere."""

import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live

from pipeline.printable import one_line
from pipeline.report.status import RunStatus, run_status, status_parts

_UNDER_WAY = ("starting", "running", "running, or killed")


def follow(run: str | Path, console: Console, seconds: float = 2.0) -> RunStatus:
    """Show a run's status until no driver works on it any more, and return the last one.

    Args:
        run: the run directory, or the run's URL.
        console: a terminal shows the table, refreshed; anything else a line a change.
        seconds: between two looks.

    Raises:
        InputError: it is not a run directory.
        ResultsDamagedError: a manifest is damaged.
    """
    if not console.is_terminal:
        return _follow_in_lines(run, console, seconds)
    with Live(console=console, auto_refresh=False) as live:
        for status in _statuses(run, seconds):
            live.update(status_parts(status), refresh=True)
    return status


def _follow_in_lines(run: str | Path, console: Console, seconds: float) -> RunStatus:
    before: dict[str, str] = {}
    for status in _statuses(run, seconds):
        now = _lines(status)
        for name, line in now.items():
            if before.get(name) != line:
                console.print(
                    one_line(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}"),
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
        before = now
    return status


def _statuses(run: str | Path, seconds: float) -> Iterator[RunStatus]:
    """The run's status now and then, the last one after its driver has gone."""
    while True:
        status = run_status(run)
        yield status
        if status.state not in _UNDER_WAY:
            return
        time.sleep(seconds)


def _lines(status: RunStatus) -> dict[str, str]:
    """What there is to say, by what it is about."""
    stopped = status.begun.stopped if status.begun is not None else None
    why = f": {stopped.reason}" if stopped is not None and status.state != "running" else ""
    lines = {"state": f"{status.place}: {status.state}{why}"}
    for phase in status.phases:
        if phase.done:
            failed = f", {len(phase.failed)} failed" if phase.failed else ""
            rows = "" if phase.rows is None else f", {phase.rows} rows"
            lines[phase.name] = (
                f"{phase.name}: {phase.done} of {phase.total} {phase.unit}{rows}{failed}"
            )
    return lines
