"""How far a run is: what is done, what is left, what failed, and whether a driver works on it."""

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipeline.places import is_url, located
from pipeline.printable import one_line
from pipeline.report.summary import problem_lines
from pipeline.results.listing import TableKind
from pipeline.results.lock import Owner
from pipeline.results.manifest import Begun, read_begun
from pipeline.results.remote import begun_at, driver_of, open_run
from pipeline.results.store import RunStore
from pipeline.spec import JobSpec, parse_spec


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: baseline, values, insertion, evaluation, general, edits or model.
        done: finished units, which a resumed run does not do again.
        total: all units.
        unit: what is counted: shards, layers, rounds or files.
        rows: rows that the finished units hold, None where there are none to count.
        failed: case_id -> why the request failed in this phase.
    """

    name: str
    done: int
    total: int
    unit: str
    rows: int | None = None
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Units that are still to be done."""
        return self.total - self.done


@dataclass(frozen=True)
class RunStatus:
    """A run as it is now.

    Attributes:
        place: the run directory, or the run's URL.
        begun: what its manifest says; None if nothing was written yet.
        is_held: whether a driver holds it; None where that cannot be told.
        owner: that driver, or the last one if it was killed.
        phases: in their order; those that the spec leaves out are not there.
        checked: how many files were compared with their checksums; None if none was.
        damaged: what is wrong with files that differ, a line each.
    """

    place: str
    begun: Begun | None
    is_held: bool | None
    owner: Owner | None
    phases: tuple[Phase, ...] = ()
    checked: int | None = None
    damaged: tuple[str, ...] = ()

    @property
    def state(self) -> str:
        """finished, running, or how the job ended before it was finished."""
        if self.begun is None:
            return "starting"
        if self.begun.status == "finished" or self.is_held:
            return "running" if self.is_held else "finished"
        if self.begun.status != "running":
            return self.begun.status
        return "killed" if self.is_held is False else "running, or killed"


def run_status(run: str | Path, *, verify: bool = False) -> RunStatus:
    """Find out how far a run is; it may be under way, interrupted or finished.

    Args:
        run: the run directory, or the run's URL.
        verify: also compare every listed file with its checksum.

    Raises:
        InputError: it is not a run directory.
        ResultsDamagedError: a manifest is damaged.
    """
    place = str(located(run))
    held, owner = driver_of(place)
    if (held or (held is None and is_url(place))) and not begun_at(place):
        return RunStatus(place, None, held, owner)
    store = open_run(place, beside=False)
    begun = read_begun(store)
    spec = parse_spec(begun.spec, f"{place}: spec")
    damaged = tuple(str(error) for _, error in store.damaged()) if verify else ()
    checked = len(store.parts()) if verify else None
    return RunStatus(place, begun, held, owner, _phases(store, begun, spec), checked, damaged)


def print_status(status: RunStatus, console: Console) -> None:
    """Show the status: a line a phase, then what failed and what to do."""
    for part in _parts(status):
        if isinstance(part, str):
            # Paths and reasons stay in one piece, to be copied.
            console.print(part, markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)


def status_parts(status: RunStatus) -> Group:
    """The same as one thing to show."""
    parts = _parts(status)
    return Group(*(Text(one_line(p)) if isinstance(p, str) else p for p in parts))


def _parts(status: RunStatus) -> Iterator[str | Table]:
    yield headline(status)
    if status.begun is None:
        return
    requests = status.begun.requests
    yield f"requests: {requests.count} read, {requests.accepted} to edit"
    yield _table(status)
    yield from _failures(status)
    if status.checked is not None:
        yield f"checksums: {status.checked - len(status.damaged)} files are sound"
    yield from (f"damaged: {line}" for line in status.damaged)
    if status.state not in ("finished", "running"):
        command = "edit" if status.begun.spec.get("rounds") is None else "sequential"
        for other in ("trace", "train", "assess"):
            command = other if status.begun.spec.get(other) is not None else command
        yield f"`editfleet {command}` with the same spec goes on with this run"


def _phases(store: RunStore, begun: Begun, spec: JobSpec) -> tuple[Phase, ...]:
    rounds = range(begun.plan.rounds)

    def of_parts(
        name: str, kind: TableKind, rounds: Container[int], total: int, unit: str = "shards"
    ) -> Phase:
        parts = [part for part in store.parts(kind) if part.round in rounds]
        rows = sum(part.rows or 0 for part in parts)
        failed = {case_id: why for part in parts for case_id, why in part.failed.items()}
        return Phase(name, len(parts), total, unit, rows, failed)

    def of_edits() -> Phase:
        from pipeline.methods import build_adapter_method  # imports torch

        kind = build_adapter_method(spec.method).table
        parts = of_parts("training", kind, rounds, begun.requests.accepted, "edits")
        return replace(parts, done=(parts.rows or 0) + len(parts.failed))

    if spec.trace is not None:
        return (of_parts("trace", "trace", [-1], begun.plan.shards),)
    if spec.train is not None:
        steps = max((part.round for part in store.parts("checkpoint")), default=0)
        # Early stopping leaves none to do.
        total = steps if begun.status == "finished" else spec.train.steps
        return (Phase("training", steps, total, "steps"),)
    if spec.assess is not None:
        return (of_parts("assessment", "assessment", [-1], begun.plan.shards),)
    assert spec.method.layers is not None
    updates, probe_shards = len(store.parts("update")), begun.plan.probe_shards
    table = spec.method.round_table
    value_shards = begun.plan.shards * len(spec.method.stages)
    if spec.method.is_locating:
        first = of_parts("attribution", "attributions", rounds, begun.plan.shards)
    elif spec.method.is_closed_form:
        first = of_parts("values", "values", rounds, value_shards)
    elif spec.method.is_piecewise:
        first = of_edits()
    else:
        first = of_parts(table, table, rounds, len(rounds), "rounds")
    found = [
        first,
        Phase("insertion", updates, len(rounds) * len(spec.method.layers), "layers"),
    ]
    if spec.evaluation.probes:
        if spec.evaluation.baseline:
            found.insert(0, of_parts("baseline", "metrics", [-1], probe_shards))
        if spec.rounds is None:
            found.append(of_parts("evaluation", "metrics", rounds, probe_shards))
    if spec.evaluation.general.corpus is not None and spec.rounds is None:
        measured = (-1, 0) if spec.evaluation.baseline else (0,)
        found.append(of_parts("general", "general", measured, len(measured), "rounds"))
    if spec.rounds is None:
        found.append(of_parts("edits", "edits", rounds, 1))
    else:
        # Each with its evaluation, whose size differs from round to round.
        found.append(of_parts("rounds", "edits", rounds, len(rounds), "rounds"))
    if spec.output.save_model:
        found.append(Phase("model", int(store.holds_model), 1, "models"))
    return tuple(found)


def headline(status: RunStatus) -> str:
    """Which state a run is in, who holds it, and why it ended if it did."""
    line = f"{status.place}: {status.state}"
    if status.is_held:
        line += f"; held by {status.owner or 'a driver'}"
    elif status.state.startswith(("killed", "running")) and status.owner is not None:
        line += f"; last held by {status.owner}"
    elif status.begun is not None and status.begun.stopped is not None:
        line += f" at {status.begun.stopped.at}: {status.begun.stopped.reason}"
    return line


def _table(status: RunStatus) -> Table:
    table = Table()
    table.add_column("phase")
    for column in ("done", "left", "rows", "failed"):
        table.add_column(column, justify="right")
    table.add_column("state")
    is_next = True
    for phase in status.phases:
        state = "done"
        if phase.left > 0:
            going = "under way" if status.is_held else "next" if phase.done == 0 else "unfinished"
            state, is_next = going if is_next else "", False
        table.add_row(
            phase.name,
            f"{phase.done} of {phase.total} {phase.unit}",
            str(phase.left),
            "" if phase.rows is None else str(phase.rows),
            str(len(phase.failed)),
            state,
        )
    return table


def _failures(status: RunStatus) -> list[str]:
    failed = {
        case_id: f"{phase.name}: {reason}"
        for phase in status.phases
        for case_id, reason in phase.failed.items()
    }
    rows = [{"status": "failed", "case_id": c, "reason": why} for c, why in failed.items()]
    return problem_lines(rows)
