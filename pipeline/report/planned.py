"""What a run was estimated to take, beside what it took."""

from collections.abc import Iterator, Mapping, Sequence

from pipeline.places import below
from pipeline.report.findings import Recorded
from pipeline.report.tables import Labelled, Table
from pipeline.results.place import MANIFEST
from pipeline.results.planned import Estimate, read_estimate
from pipeline.results.reading import Run
from pipeline.results.recorded import check_recorded


def estimates(labelled: Labelled) -> Table | None:
    """Seconds by phase, memory and stored bytes; None where no run was planned with `--save`."""
    return _table(
        [
            row
            for label, findings in labelled
            if findings.estimate is not None
            for row in _rows(
                label, findings.summary["seconds"], findings.recorded, findings.estimate
            )
        ]
    )


def estimate_of(run: Run) -> Table | None:
    """The same of one job that edits nothing.

    Raises:
        ResultsDamagedError: its manifest or its plan is damaged.
    """
    estimate = read_estimate(run.path)
    if estimate is None:
        return None
    recorded = check_recorded(run.manifest, Recorded, below(run.place, MANIFEST))
    return _table(_rows(recorded.name, run.summary["seconds"], recorded, estimate))


def _rows(
    label: str, seconds: Mapping[str, float], recorded: Recorded, estimate: Estimate
) -> list[tuple[str, ...]]:
    return [
        (label, what, unit, f"{guess:.4g}", f"{found:.4g}", f"{found / guess:.2f}")
        for what, unit, guess, found in _compared(seconds, recorded, estimate)
        if guess > 0 and found > 0
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> Table | None:
    if not rows:
        return None
    head = ("run", "what", "unit", "estimated", "measured", "measured / estimated")
    return Table("Plan and reality", head, rows, frozenset({3, 4, 5}))


def _compared(
    seconds: Mapping[str, float], recorded: Recorded, estimate: Estimate
) -> Iterator[tuple[str, str, float, float]]:
    """What, its unit, estimated, measured; times only where it was planned for as many workers."""
    for phase, guess in estimate.seconds.get(recorded.workers.count, {}).items():
        yield phase, "s", guess, seconds.get(phase, 0.0)
    peaks = [memory.resident for memory in recorded.peak_worker_memory_bytes]
    yield (
        "memory of a worker",
        "MB",
        estimate.memory.worker_bytes / 1e6,
        max(peaks, default=0) / 1e6,
    )
    for kind, guess in estimate.stored.items():
        yield (
            f"{kind} in the run directory",
            "MB",
            guess / 1e6,
            recorded.bytes.get(kind, 0) / 1e6,
        )
