"""`rounds.jsonl`: how long each round of a study took, one JSON line a round, appended to."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ResultsDamagedError
from pipeline.results.atomic import append_line
from pipeline.results.damage import first_problem

ROUNDS = "rounds.jsonl"


class RoundSeconds(BaseModel):
    """The seconds of each phase of a round, as far as one driver worked on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: Annotated[int, Field(ge=0)]
    seconds: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


def write_seconds(run: Path, round: int, seconds: dict[str, float]) -> None:
    """Append a round's line.

    Raises:
        OSError: the disk is full.
    """
    append_line(run / ROUNDS, RoundSeconds(round=round, seconds=seconds).model_dump_json())


def read_seconds(run: Path) -> list[RoundSeconds]:
    """The rounds in ascending order; the last line of a round counts, a cut one does not.

    Raises:
        ResultsDamagedError: a line is not what was written.
    """
    path = run / ROUNDS
    if not path.is_file():
        return []
    found: dict[int, RoundSeconds] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            entry = RoundSeconds.model_validate_json(line)
        except ValidationError as error:
            if not line or not line.endswith(b"}"):
                continue
            what = first_problem(error)
            raise ResultsDamagedError(f"{path}, line {number}: {what}; delete the line") from error
        found[entry.round] = entry
    return [found[round] for round in sorted(found)]
