"""A survey: models x editors x data sets, their cells on the same workers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout
from rich.console import Console

from pipeline.cluster.comparison import Hosts, Member, run_member, start_hosts
from pipeline.cluster.plan import Plan, make_plan, settle_spec
from pipeline.cluster.progress import PhaseProgress
from pipeline.cluster.resume import open_earlier
from pipeline.cluster.run import check_job
from pipeline.cluster.sharing import Sharing, asked_key
from pipeline.errors import EditfleetError, InputError
from pipeline.evaluation.survey import cost_rows, share_rows
from pipeline.methods import check_batch
from pipeline.results.atomic import make_directory, write_atomically
from pipeline.results.driving import driving
from pipeline.results.encoding import to_parquet
from pipeline.results.reading import read
from pipeline.results.remote import begun_at, next_free_place, writing_into
from pipeline.results.schemas import conform
from pipeline.spec import JobSpec
from pipeline.spec.cells import Cell, survey_cells
from pipeline.watching import logs
from pipeline.watching.watch import watch_of

TABLE = "survey.parquet"
_LOCK = ".survey.lock"
_PATIENCE_SECONDS = 0.5

Status = Literal["done", "impossible", "failed"]


@dataclass(eq=False)
class Entry:
    """A cell, how it goes on, and what became of it.

    Attributes:
        cell: it.
        plan: what it does; null where it cannot be made.
        status: null until it has ended.
        reason: why it is not done.
        rows: of survey.parquet.
    """

    cell: Cell
    plan: Plan | None = None
    status: Status | None = None
    reason: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class SurveyResult:
    """What a survey leaves.

    Attributes:
        place: the directory or URL.
        table: its rows (`pipeline.results.schemas.SURVEY`).
        failed: label of a cell that failed -> reason.
        runs: the run directories of the cells that are done.
    """

    place: str
    table: pa.Table
    failed: dict[str, str]
    runs: list[str]


def run_survey(
    spec: JobSpec, *, restart: bool = False, console: Console | None = None
) -> SurveyResult:
    """Make every cell that `spec.survey` asks for, each over all workers.

    Cells are made one after another, and of the sequences at the end as many at the same time as
    `survey.sequence.at_once` says.

    A cell is a study of its own in RUN/model/dataset/editor/cell; one that is complete is not made
    again, one that was interrupted is gone on with. What an editor cannot do, and what fails, is
    in the table with its reason, and the others go on. RUN/survey.parquet is written anew after
    every cell.

    Args:
        spec: the job, with `survey`.
        restart: begin anew in the first of PATH, PATH-2, PATH-3, ... that is free.
        console: where to show progress; null is silent.

    Raises:
        InputError: the spec or the requests are wrong, no editor can do anything of it, a cell's
            directory holds another run, or another driver is at this survey.
    """
    if spec.survey is None:
        raise InputError("survey: say what to compare: give survey.editors (docs/survey.md)")
    if spec.compare is not None or spec.trace is not None:
        raise InputError("survey: compare and trace are other jobs; set them to null")
    if restart:
        spec = spec.at(next_free_place(spec.place))
    entries = plan_survey(survey_cells(spec))
    with _alone(spec):
        for _, of_model in groupby(entries, key=lambda entry: entry.cell.model):
            _make_cells(list(of_model), entries, spec, console)
        table = _write(entries, spec)
    return SurveyResult(
        spec.place,
        table,
        {e.cell.label: e.reason or "" for e in entries if e.status == "failed"},
        [e.cell.spec.place for e in entries if e.status == "done"],
    )


@contextmanager
def _alone(spec: JobSpec) -> Iterator[None]:
    """Be the only driver of a survey in a directory; cells at URLs are claimed one by one."""
    if spec.url is not None:
        yield
        return
    try:
        make_directory(spec.run_path)
        with FileLock(spec.run_path / _LOCK, timeout=_PATIENCE_SECONDS, thread_local=False):
            yield
    except Timeout as error:
        raise InputError(f"{spec.place}: another driver is at this survey") from error


class _Plans:
    """Plans of cells; those that ask the same of the same requests are read and cut once."""

    def __init__(self) -> None:
        self._found: dict[str, Plan] = {}

    def of(self, spec: JobSpec) -> Plan:
        """The plan of a spec (InputError where there can be none)."""
        _, settled, source = settle_spec(spec)
        key = asked_key(settled)
        if key not in self._found:
            self._found[key] = make_plan(spec)
        return replace(self._found[key], spec=settled, settings_source=source)


def plan_survey(cells: Sequence[Cell]) -> list[Entry]:
    """Plan every cell of `survey_cells`; one that cannot be made has a reason in a plan's place.

    Raises:
        InputError: not one can.
    """
    plans = _Plans()
    entries: list[Entry] = []
    for cell in cells:
        try:
            entries += _planned(cell, plans)
        except InputError as error:
            entries.append(Entry(cell, status="impossible", reason=str(error)))
    if all(entry.plan is None for entry in entries):
        raise InputError(f"survey: not one cell can be made; the first: {entries[0].reason}")
    return entries


def _planned(cell: Cell, plans: _Plans) -> Iterator[Entry]:
    """A cell with its plan, and the sizes apart for which there are not enough requests."""
    has = plans.of(cell.spec.model_copy(update={"rounds": None})).num_requests
    fits = cell if cell.kind == "single" else cell.limited_to(has)
    sizes = () if fits is None else fits.sizes
    if fits is not None:
        plan = plans.of(fits.spec)
        check_batch(plan.spec.method, max(len(plan.rounds.requests(r)) for r in _rounds(plan)))
        yield Entry(fits, plan)
    if left := tuple(size for size in cell.sizes if size not in sizes):
        reason = f"the data set has {has} requests that can be edited"
        yield Entry(replace(cell, sizes=left), status="impossible", reason=reason)


def _rounds(plan: Plan) -> range:
    return range(len(plan.rounds.shards))


def _make_cells(
    of_model: Sequence[Entry], entries: Sequence[Entry], spec: JobSpec, console: Console | None
) -> None:
    """Make the cells of one model that are left: sequences last, several of them at once."""
    assert spec.survey is not None
    sequence = spec.survey.sequence
    at_once = 1 if sequence is None else sequence.at_once
    for entry in of_model:
        if entry.plan is not None:
            _look_whether_complete(entry, entry.plan, console)
    left = [entry for entry in of_model if entry.plan is not None and entry.status is None]
    _write(entries, spec)
    if not left:
        return
    try:
        with PhaseProgress(console, left[0].cell.model).phase("start", 1):
            hosts = start_hosts([entry.plan.spec for entry in left if entry.plan], at_once)
    except EditfleetError as error:
        for entry in left:
            entry.status, entry.reason = "failed", str(error)
        return

    def make(entry: Entry) -> None:
        number = f"{entries.index(entry) + 1}/{len(entries)} "
        _make(entry, hosts, left.index(entry), at_once, _progress(entry, console, number))

    try:
        _in_threads(make, [e for e in left if e.cell.kind != "sequence"], 1, hosts, entries, spec)
        _in_threads(
            make, [e for e in left if e.cell.kind == "sequence"], at_once, hosts, entries, spec
        )
    finally:
        hosts.close()


def _in_threads(
    make: Callable[[Entry], None],
    left: Sequence[Entry],
    at_once: int,
    hosts: Hosts,
    entries: Sequence[Entry],
    spec: JobSpec,
) -> None:
    """Make cells, so many at the same time, and write the table after each.

    What ends this, such as a signal, lets those that are under way end at their next call.
    """
    with ThreadPoolExecutor(at_once) as threads:
        try:
            for done in as_completed([threads.submit(make, entry) for entry in left]):
                done.result()
                _write(entries, spec)
        except BaseException:
            hosts.ended.set()
            threads.shutdown(cancel_futures=True)
            raise


def _progress(entry: Entry, console: Console | None, number: str = "") -> PhaseProgress:
    return PhaseProgress(console, f"{number}{entry.cell.label}")


def _look_whether_complete(entry: Entry, plan: Plan, console: Console | None) -> None:
    """Take a cell's rows if an earlier survey has made it.

    Raises:
        InputError: another driver has it, or its directory holds another run.
    """
    spec = plan.spec
    if not begun_at(spec.place):
        return
    with driving(spec.run_path, spec.url):
        if check_job(plan, open_earlier(spec), _progress(entry, console)) is not None:
            entry.status = "done"
            entry.rows = [*_rows_of(entry, plan)]


def _make(entry: Entry, hosts: Hosts, place: int, at_once: int, progress: PhaseProgress) -> None:
    """Make one cell, or go on with it; what ends it early is its reason."""
    plan = entry.plan
    assert plan is not None
    spec = plan.spec
    with logs.about(run=spec.place), driving(spec.run_path, spec.url) as mirror:
        progress.watch, progress.mirror = watch_of(spec), mirror
        store = open_earlier(spec)
        member = Member(plan, store, progress)
        check_job(plan, store, progress)
        run_member(hosts, place, member, at_once, Sharing())
    if member.error is None:
        entry.status = "done"
    elif isinstance(member.error, EditfleetError):
        # What is wrong with the input here is what the editor cannot do with this model.
        is_input = isinstance(member.error, InputError)
        entry.status, entry.reason = ("impossible" if is_input else "failed"), str(member.error)
    else:
        raise member.error
    entry.rows = [*_rows_of(entry, plan)]


def _rows_of(entry: Entry, plan: Plan) -> Iterator[dict[str, Any]]:
    """The rows of a cell that has ended; of a sequence that failed, of what it had reached."""
    spec = plan.spec
    begun = begun_at(spec.place)
    run = read(spec.place) if begun else None
    left = list(entry.cell.sizes)
    if run is not None and entry.status != "impossible":
        metrics = run.metrics()
        # A round that diverged has rows of edits/ and no scores, one that was interrupted the other
        # way round.
        whole = {*run.edits()["round"].to_pylist()} & {*metrics["round"].to_pylist()}
        for size, round in _scored(entry.cell, plan):
            if round not in whole:
                break
            left.remove(size)
            edits = min(size, plan.num_requests)
            yield from _done(entry, edits, share_rows(_of_round(metrics, spec, round)))
    if run is not None and entry.status == "done":
        edits = plan.num_requests
        costs = cost_rows(run.manifest, run.summary["seconds"], edits)
        yield from _done(entry, edits, [*costs, _failures(run.edits())])
    for size in left:
        yield _described(entry, size)


def _scored(cell: Cell, plan: Plan) -> list[tuple[int, int]]:
    """Each size of a cell, and the round after which that many edits had been made."""
    return list(zip(cell.sizes, plan.rounds.evaluated[-len(cell.sizes) :], strict=True))


def _of_round(metrics: pa.Table, spec: JobSpec, round: int) -> pa.Table:
    """The scores of edits after a round; of all rounds, where each stands alone."""
    edits = metrics.filter(pc.greater_equal(metrics["edit_round"], 0))
    if spec.rolls_back:
        return edits.filter(pc.greater_equal(edits["round"], 0))
    return edits.filter(pc.equal(edits["round"], round))


def _failures(edits: pa.Table) -> dict[str, Any]:
    failed = edits.filter(pc.equal(edits["status"], "failed"))
    first = failed["reason"][0].as_py() if failed.num_rows else None
    return {"measure": "failed_edits", "value": float(failed.num_rows), "reason": first}


def _done(entry: Entry, edits: int, measured: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in measured:
        yield {**_described(entry, edits), "status": "done", "reason": None, **row}


def _described(entry: Entry, edits: int) -> dict[str, Any]:
    """What all rows of a cell have in common."""
    cell = entry.cell
    return {
        "model": cell.model,
        "dataset": cell.dataset,
        "editor": cell.editor,
        "setting": cell.kind,
        "edits": edits,
        "status": entry.status,
        "reason": entry.reason,
        "run": "/".join((cell.model, cell.dataset, cell.editor, cell.name)),
    }


def _write(entries: Sequence[Entry], spec: JobSpec) -> pa.Table:
    """Write what is known of all cells so far."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        if not entry.rows and entry.status is not None:
            rows += [_described(entry, size) for size in entry.cell.sizes]
        rows += entry.rows
    table = conform("survey", rows)
    with writing_into(spec.place) as directory:
        write_atomically(directory / TABLE, to_parquet(table))
    return table
