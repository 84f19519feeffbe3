"""`plan.json`: what a job was estimated to cost, for its report to compare with what happened."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import InputError, ResultsDamagedError
from pipeline.places import below, located
from pipeline.results.atomic import write_atomically
from pipeline.results.damage import first_problem
from pipeline.results.place import PLAN
from pipeline.results.remote import begun_at, require_free, writing_into

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Memory(BaseModel):
    """Bytes by what they are for.

    `worker` is at its largest while values are searched or while keys wait between two layers,
    whichever is more; both lines are there, and `worker_bytes` counts the larger one. `gpu` is the
    fullest GPU of a worker that has several, else empty.
    """

    model_config = ConfigDict(frozen=True)

    worker: dict[str, int]
    reducer: dict[str, int]
    driver: dict[str, int]
    gpu: dict[str, int] = {}

    @property
    def worker_bytes(self) -> int:
        """Of one worker at its peak."""
        return at_its_peak(self.worker)

    @property
    def gpu_bytes(self) -> int:
        """Of the fullest GPU of a worker that has several, at its peak; of the worker else."""
        return at_its_peak(self.gpu or self.worker)

    @property
    def reducer_bytes(self) -> int:
        """Of the reducer at its peak."""
        return sum(self.reducer.values())

    @property
    def driver_bytes(self) -> int:
        """Of the driver at its peak."""
        return sum(self.driver.values())


def at_its_peak(parts: Mapping[str, int]) -> int:
    """Bytes of a worker, or of a GPU of one, at its largest: some parts are never there at once."""
    turns = ("activations of a value batch", "hidden states and keys", "covariance sums")
    always = sum(size for name, size in parts.items() if name not in turns)
    return always + max(parts.get(name, 0) for name in turns)


class Transfer(BaseModel):
    """Bytes that a phase moves between driver, workers and reducer.

    `parameters` and `gradients` are of the training of an editor: what workers are given, and what
    they return.
    """

    model_config = ConfigDict(frozen=True)

    values: int = 0
    keys: int = 0
    updates: int = 0
    metrics: int = 0
    covariance: int = 0
    parameters: int = 0
    gradients: int = 0


class PlannedTraining(BaseModel):
    """What the training of an editor is of.

    Attributes:
        learnt: requests to train on.
        held: requests to measure on.
        measurements: how often they are measured on.
        parameters: of the editor.
        step_out: bytes that a step gives to the workers.
        step_back: bytes that they return.
    """

    model_config = ConfigDict(frozen=True)

    learnt: int
    held: int
    measurements: int
    parameters: int
    step_out: int
    step_back: int


class Estimate(BaseModel):
    """What a job is going to cost.

    Attributes:
        rate: FLOP/s of one worker in matrix products.
        rate_source: `measured` on this machine as busy as it was, or `given`.
        steps: steps that an edit is taken to need; of a training, those that it makes.
        seconds: workers -> phase -> seconds.
        moved: bytes between the processes.
        stored: part kind -> bytes in the run directory.
        memory: bytes of a worker, the reducer and the driver.
        training: of a training alone.
    """

    model_config = ConfigDict(frozen=True)

    rate: _Positive
    rate_source: Literal["measured", "given"]
    steps: _Positive
    seconds: dict[int, dict[str, _Seconds]]
    moved: Transfer
    stored: dict[str, int]
    memory: Memory
    training: PlannedTraining | None = None


def write_estimate(place: str | Path, estimate: Estimate) -> Path | str:
    """Put an estimate where a run is going to be; return its path or URL.

    Raises:
        InputError: a run has begun there, or the place holds something else or cannot be written.
    """
    place = located(place)
    if begun_at(place):
        raise InputError(
            f"{place} holds a run already; plan it before it begins, or without --save"
        )
    require_free(place)
    try:
        with writing_into(place) as directory:
            data = estimate.model_dump_json(indent=2).encode() + b"\n"
            write_atomically(directory / PLAN, data)
    except OSError as error:
        raise InputError(
            f"{place}: cannot write {PLAN} ({error.strerror}); choose another output.path"
        ) from error
    return place / PLAN if isinstance(place, Path) else below(place, PLAN)


def read_estimate(run: Path) -> Estimate | None:
    """The estimate that a run was planned with; None if it was not.

    Raises:
        ResultsDamagedError: the file is not what was written.
    """
    path = run / PLAN
    if not path.is_file():
        return None
    try:
        return Estimate.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ResultsDamagedError(f"{path}: {first_problem(error)}; delete the file") from error
