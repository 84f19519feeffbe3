"""What manifest.json says about how a run was begun, checked when it is read back."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import ResultsDamagedError
from pipeline.places import below
from pipeline.results.damage import first_problem
from pipeline.results.place import MANIFEST
from pipeline.results.store import RunStore

_Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Requests(_Part):
    """The requests that were read: all, those accepted, and the SHA-256 of their content."""

    count: _Count
    accepted: _Count
    sha256: str


class Cut(_Part):
    """How many shards of requests there are, how many probes, and how many shards of those.

    In a study all rounds' shards together; probes are counted once, as before the first round.
    """

    shards: _Count
    probes: _Count
    probe_shards: _Count
    rounds: Annotated[int, Field(ge=1, le=2**31 - 1)] = 1


class HeldOut(_Part):
    """The texts of `evaluation.general`: how many, and the SHA-256 of their content."""

    texts: _Count
    sha256: str


class Model(_Part):
    """The model."""

    path: str
    fingerprint: str
    dtype: str


class CovarianceDigests(_Part):
    """Layer, as text, -> SHA-256 of its covariance, and where the covariances were."""

    sha256: dict[str, str]
    directory: str


class Queries(_Part):
    """What a method remembers of the unedited model: how many queries, and their SHA-256."""

    count: _Count
    sha256: str


class Workers(_Part):
    """Where the workers ran."""

    device: str


class Stopped(_Part):
    """Why the job ended before it was finished."""

    at: str
    reason: str


class Begun(_Part):
    """The entries of a manifest that resuming and reporting rely on."""

    name: str
    status: Literal["running", "interrupted", "failed", "finished"]
    started: str
    spec: dict[str, Any]
    spec_sha256: str
    contexts_source: Literal["spec", "generated"]
    anchor_source: Literal["spec", "measured"] = "spec"
    requests: Requests
    plan: Cut
    held_out: HeldOut | None = None
    model: Model
    covariance: CovarianceDigests | None = None
    queries: Queries | None = None
    workers: Workers
    versions: dict[str, str | None]
    seconds: dict[str, float] = {}
    stopped: Stopped | None = None


def read_begun(store: RunStore) -> Begun:
    """Read the manifest of a run that this version of editfleet began.

    Raises:
        ResultsDamagedError: an entry is missing or not what was written; it is named.
    """
    try:
        return Begun.model_validate(store.manifest)
    except ValidationError as error:
        raise ResultsDamagedError(
            f"{below(store.place, MANIFEST)}: {first_problem(error)}; restore the file from a copy,"
            " or begin anew in another directory with --restart (restart=True)"
        ) from error
