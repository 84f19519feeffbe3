"""Everything that a report says of one run, read and counted; how it looks is decided elsewhere."""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from pipeline.evaluation.summary import summarise_job
from pipeline.places import below
from pipeline.report.forgetting import SCORED_COLUMNS, Forgetting, forgetting
from pipeline.report.neighbours import Neighbours, worst_neighbours
from pipeline.report.norms import UpdateNorm, update_norms
from pipeline.report.reading import flattened, read_columns
from pipeline.report.status import RunStatus, run_status
from pipeline.results.listing import TableKind
from pipeline.results.place import MANIFEST
from pipeline.results.planned import Estimate, read_estimate
from pipeline.results.reading import Run
from pipeline.results.recorded import RecordedModel, RecordedSummary, check_recorded
from pipeline.results.schemas import GENERAL
from pipeline.results.seconds import RoundSeconds, read_seconds

PROBLEMS_SHOWN = 50

PATCH_MEASURES = {
    "patches": "patches",
    "steps": "steps",
    "edit_loss": "loss of the edit, nats a target token",
    "target_probability": "probability of the new object",
    "least_activation": "least inner value at its own token",
    "greatest_memory": "greatest inner value at a watched query",
    "seconds": "seconds",
}
"""Columns of patches/ that a report shows, and what it calls them."""

Floats = NDArray[np.float64]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Workers(_Part):
    """Where the workers ran."""

    count: int = Field(ge=0)
    threads: int = Field(ge=0)
    device: str


class Memory(_Part):
    """A worker's peak memory, in bytes; `device` is that on a GPU."""

    resident: int = Field(ge=0)
    device: int = Field(ge=0)


class Recorded(_Part):
    """The entries of a manifest that a report shows."""

    name: str
    status: str
    started: str
    finished: str | None = None
    spec: dict[str, Any]
    contexts_source: str | None = None
    seconds: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    model: RecordedModel
    workers: Workers
    versions: dict[str, str | None]
    peak_worker_memory_bytes: tuple[Memory, ...] = ()
    bytes: dict[str, int] = {}

    @property
    def rolls_back(self) -> bool:
        """Whether every round of the study began at the unedited model."""
        rounds = self.spec.get("rounds")
        return isinstance(rounds, dict) and rounds.get("rollback") is True


@dataclass(frozen=True)
class Findings:
    """One run.

    Attributes:
        run: the run.
        recorded: what its manifest says.
        settings: the resolved spec, dotted names to text.
        status: how far it is, where it is not finished.
        summary: `summary.json`, checked; the same of what is done, where the run is not finished.
        general: the summary's measures of the whole model, an entry a round.
        rounds: rounds with an update, at least one in a finished run.
        forgetting: scores of a study; None for a batch, whose are in the summary.
        norms: of the stored updates.
        values: columns of values/ as float64, not a number where there is none.
        training: columns of training/ as float64.
        neurons: columns of neurons/ as float64.
        patches: columns of patches/ as float64.
        problems: the first requests that were not applied, as rows of edits/.
        neighbours: None where they were not scored before and after.
        estimate: what it was planned to take; None without a plan.
        round_seconds: of a study, how long each phase of each round took.
        harness: rows that `editfleet harness` left.
    """

    run: Run
    recorded: Recorded
    settings: dict[str, str]
    status: RunStatus | None
    summary: dict[str, Any]
    general: list[dict[str, Any]]
    rounds: int
    forgetting: Forgetting | None
    norms: list[UpdateNorm]
    values: dict[str, Floats]
    training: dict[str, Floats]
    neurons: dict[str, Floats]
    patches: dict[str, Floats]
    problems: list[dict[str, Any]]
    neighbours: Neighbours | None
    estimate: Estimate | None
    round_seconds: list[RoundSeconds]
    harness: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any] | None:
        """The summary's entry of the last evaluated round; None without an evaluation."""
        entries = [e for e in self.summary["evaluation"]["rounds"] if e["round"] >= 0]
        return entries[-1] if entries else None

    @property
    def baseline(self) -> dict[str, Any] | None:
        """The summary's entry of the unedited model; None if it was not scored."""
        return next((e for e in self.summary["evaluation"]["rounds"] if e["round"] < 0), None)


def settings_of(run: Run) -> dict[str, str]:
    """The resolved spec in a run's manifest, dotted names to text.

    Raises:
        ResultsDamagedError: the manifest is not what was written.
    """
    return flattened(check_recorded(run.manifest, Recorded, below(run.place, MANIFEST)).spec)


def find(run: Run) -> Findings:
    """Read what a report shows of a run; large tables are scanned, only what is needed kept.

    Of a run that is not finished, what is whole counts: its evaluated rounds, not half of one.

    Raises:
        InputError: the run says that it is finished and has no summary.
        ResultsDamagedError: a file of the run is damaged.
    """
    recorded = check_recorded(run.manifest, Recorded, below(run.place, MANIFEST))
    is_finished = recorded.status == "finished"
    whole = None if is_finished else _whole_rounds(run)
    summary = run.summary if whole is None else _summary_so_far(run, recorded, whole)
    checked = check_recorded(summary, RecordedSummary, below(run.place, "summary.json"))
    norms = update_norms(run)
    apart = recorded.rolls_back
    rounds = 1 + max((norm.round for norm in norms), default=0)
    last = max((entry["round"] for entry in summary["evaluation"]["rounds"]), default=-1)
    return Findings(
        run=run,
        recorded=recorded,
        settings=flattened(recorded.spec),
        status=None if is_finished else run_status(run.place),
        summary=summary,
        general=[entry.model_dump() for entry in checked.general],
        rounds=rounds,
        forgetting=forgetting(_metrics(run, whole)) if rounds > 1 and not apart else None,
        norms=norms,
        values=_values(run),
        neurons=_columns(run, "neurons", ["layer", "is_edited"]),
        patches=_columns(run, "patches", [*PATCH_MEASURES]),
        training=_columns(run, "training", ["round", "epoch", "step", "edits", "loss"]),
        problems=_problems(run),
        neighbours=worst_neighbours(run, last) if last >= 0 and not apart else None,
        estimate=read_estimate(run.path),
        round_seconds=read_seconds(run.path),
        harness=run.harness().to_pylist(),
    )


def _whole_rounds(run: Run) -> list[int]:
    """The rounds of a run under way whose scores are all there: edits/ is written after them."""
    rounds = set(read_columns(run, "edits", ["round"])["round"].to_pylist())
    firsts: tuple[TableKind, ...] = ("values", "training", "attributions", "patches", "memory")
    is_past_baseline = any(run.files(kind) for kind in firsts)
    return sorted(rounds | ({-1} if is_past_baseline else set()))


def _metrics(run: Run, rounds: list[int] | None) -> pa.Table:
    chosen = None if rounds is None else pc.field("round").isin(rounds)
    return read_columns(run, "metrics", SCORED_COLUMNS, chosen)


def _summary_so_far(run: Run, recorded: Recorded, rounds: list[int]) -> dict[str, Any]:
    edits = read_columns(run, "edits", ["status", "reason"])
    general = read_columns(run, "general", GENERAL.names, pc.field("round").isin(rounds))
    apart = recorded.rolls_back
    counted = summarise_job(edits, _metrics(run, rounds), general, rolled_back=apart)
    return {"name": recorded.name, **counted, "seconds": recorded.seconds}


def _values(run: Run) -> dict[str, Floats]:
    names = ["round", "initial_norm", "delta_norm", "steps", "loss", "target_probability"]
    return _columns(run, "values", [*names, "seconds"])


def _columns(run: Run, kind: TableKind, names: list[str]) -> dict[str, Floats]:
    table = read_columns(run, kind, names)
    return {name: table[name].cast(pa.float64()).to_numpy() for name in table.column_names}


def _problems(run: Run) -> list[dict[str, Any]]:
    columns = ["round", "case_id", "subject", "prompt", "target_new", "status", "reason"]
    rows = read_columns(run, "edits", columns, pc.field("status") != "applied")
    found: list[dict[str, Any]] = rows.slice(0, PROBLEMS_SHOWN).to_pylist()
    return found
