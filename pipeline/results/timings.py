"""`timings.jsonl`: when each phase and each call to a worker began and ended, a JSON line each.

It is for people and their tools: nothing of a job's result depends on it, and a resumed job appends
to it.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ResultsDamagedError
from pipeline.results.atomic import append_line
from pipeline.results.damage import first_problem

TIMINGS = "timings.jsonl"

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
CallOutcome = Literal["done", "failed", "lost"]


class Timing(BaseModel):
    """One phase of the driver, or one call to a worker.

    Attributes:
        phase: what it was for: start, covariance, baseline, values, insertion, evaluation, general.
        call: the worker's method; None for the phase itself.
        start: when it began, in seconds since 1970 by the driver's clock.
        seconds: how long it took, for a call with its way there and back.
        worker, shard, items: who did what; of a call only.
        round: -1 is the unedited model; None where it belongs to none.
        layer: the edited block, while keys are measured or an update is applied.
        outcome: lost with its worker, and tried again; failed, and split or given up.
        retries: how often the shard had been lost before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: str
    call: str | None = None
    start: _Seconds
    seconds: _Seconds
    worker: _Count | None = None
    shard: _Count | None = None
    items: _Count | None = None
    round: Annotated[int, Field(ge=-1)] | None = None
    layer: _Count | None = None
    outcome: CallOutcome | None = None
    retries: _Count = 0


def write_timing(run: Path, timing: Timing) -> None:
    """Append a line.

    Raises:
        OSError: the disk is full or not writable.
    """
    append_line(run / TIMINGS, timing.model_dump_json(exclude_defaults=True))


def read_timings(run: Path) -> list[Timing]:
    """All lines in their order; one that a crash cut short does not count.

    Raises:
        ResultsDamagedError: a line is not what was written.
    """
    path = run / TIMINGS
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            found.append(Timing.model_validate_json(line))
        except ValidationError as error:
            if not line.endswith(b"}"):
                continue
            what = first_problem(error)
            raise ResultsDamagedError(f"{path}, line {number}: {what}; delete the line") from error
    return found
