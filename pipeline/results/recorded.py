"""What other parts of the program need of `manifest.json` and `summary.json`, checked when read.

A run directory may come from anyone, so nothing in it is taken for what it should be.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ResultsDamagedError
from pipeline.results.damage import first_problem

Checked = TypeVar("Checked", bound=BaseModel)
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RecordedModel(_Part):
    """The model that was edited."""

    path: str
    revision: str | None = None
    fingerprint: str


class RecordedRun(_Part):
    """What applying and exporting a run rely on; `spec` is checked by `parse_spec`."""

    status: str
    spec: dict[str, Any]
    model: RecordedModel
    versions: dict[str, str | None]


class _Score(_Part):
    score: _Number
    low: _Number
    high: _Number


class _Kind(_Part):
    exact: _Score | None = None
    unchanged: _Score | None = None
    generated_match: _Score | None = None
    generated_exact: _Score | None = None
    fluency: _Number | None = None


class _Round(_Part):
    round: int
    ES: _Score | None
    PS: _Score | None
    NS: _Score | None
    S: _Score | None
    probes: dict[str, _Kind]


class _Evaluation(_Part):
    rounds: list[_Round]


class _General(_Part):
    round: int
    nll: _Number | None = None
    perplexity: _Number | None = None
    token_accuracy: _Number | None = None
    kl: _Number | None = None
    same_argmax: _Number | None = None
    weight_norm: dict[str, _Number | None] = {}
    update_norm: dict[str, _Number | None] = {}


class RecordedSummary(_Part):
    """What the summary tables show."""

    name: str
    requests: dict[str, int]
    not_taken: int | None = None
    evaluation: _Evaluation
    general: list[_General] = []
    seconds: dict[str, _Number]


def check_recorded(content: Any, shape: type[Checked], source: str | Path) -> Checked:
    """Check what was read of a run against the shape that is needed.

    Raises:
        ResultsDamagedError: an entry is missing or another; `source` names the file.
    """
    try:
        return shape.model_validate(content)
    except ValidationError as error:
        raise ResultsDamagedError(
            f"{source}: {first_problem(error)}; restore the file from a copy or run the job again"
        ) from error
