"""A run's timings as a Chrome trace: open it at ui.perfetto.dev or chrome://tracing.

Format: "Trace Event Format" (the Catapult project), complete events `X` in microseconds.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.results.atomic import write_atomically
from pipeline.results.remote import open_run
from pipeline.results.timings import TIMINGS, Timing, read_timings

_DRIVER = 0
_PROCESS = 1


def write_timeline(run: str | Path, output: Path) -> int:
    """Write a run's timeline, one row for the driver and one a worker; return how many events.

    Raises:
        InputError: it is not a run directory, holds no timings, or the output cannot be written.
        ResultsDamagedError: the timings are damaged.
    """
    store = open_run(run)
    name = str(store.manifest["name"])
    timings = read_timings(store.path)
    if not timings:
        raise InputError(f"{run} has no {TIMINGS}: an earlier version of editfleet made the run")
    try:
        write_atomically(output, json.dumps(trace(timings, name)).encode())
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror})") from error
    return len(timings)


def trace(timings: list[Timing], name: str) -> dict[str, Any]:
    """The trace as plain data; time 0 is the first event's start."""
    zero = min(timing.start for timing in timings)
    rows = {_DRIVER: "driver"}
    rows |= {t.worker + 1: f"worker {t.worker}" for t in timings if t.worker is not None}
    named = [
        {"ph": "M", "pid": _PROCESS, "tid": row, "name": "thread_name", "args": {"name": label}}
        for row, label in sorted(rows.items())
    ]
    process = {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": name}}
    return {
        "traceEvents": [process, *named, *(_event(timing, zero) for timing in timings)],
        "displayTimeUnit": "ms",
    }


def _event(timing: Timing, zero: float) -> dict[str, Any]:
    what = timing.model_dump(exclude_none=True, exclude={"start", "seconds", "phase", "call"})
    label = timing.phase if timing.shard is None else f"{timing.phase} shard {timing.shard}"
    return {
        "ph": "X",
        "pid": _PROCESS,
        "tid": _DRIVER if timing.worker is None else timing.worker + 1,
        "name": label if timing.outcome in (None, "done") else f"{label} ({timing.outcome})",
        "cat": timing.phase,
        "ts": round((timing.start - zero) * 1e6),
        "dur": round(timing.seconds * 1e6),
        "args": what,
    }
