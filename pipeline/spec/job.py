"""JobSpec: all settings of a job, which of them decide its result, and how two jobs differ."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.places import copy_directory, is_url
from pipeline.setting_types import Seed
from pipeline.spec.assess import AssessSpec
from pipeline.spec.compare import CompareSpec
from pipeline.spec.groups import (
    ClusterSpec,
    CovarianceSpec,
    EvaluationSpec,
    ModelSpec,
    OutputSpec,
    RequestsSpec,
)
from pipeline.spec.method import MethodSpec
from pipeline.spec.part import Part
from pipeline.spec.rounds import RoundsSpec
from pipeline.spec.survey import SurveySpec
from pipeline.spec.trace import TraceSpec
from pipeline.spec.train import TrainSpec

_LONGEST_SHOWN = 200


class JobSpec(Part):
    """Everything that defines one editing job."""

    name: Annotated[
        str, Field(min_length=1, pattern=r"^[\w.\-]*[\w\-][\w.\-]*$", max_length=60)
    ] = "edit"
    """Name of the job; letters, digits, dot, dash and underscore."""
    model: ModelSpec = ModelSpec()
    requests: RequestsSpec = RequestsSpec()
    method: MethodSpec = MethodSpec()
    covariance: CovarianceSpec = CovarianceSpec()
    cluster: ClusterSpec = ClusterSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    rounds: RoundsSpec | None = None
    """Rounds of a sequential study (`editfleet sequential`); null edits all in one batch."""
    compare: CompareSpec | None = None
    """Methods and seeds to make the study with, side by side; null makes the one that the rest of
    the spec describes."""
    trace: TraceSpec | None = None
    """Causal tracing (`editfleet trace`), which edits nothing; null in every other job."""
    survey: SurveySpec | None = None
    """Models, editors and data sets to compare (`editfleet survey`); null in every other job."""
    train: TrainSpec | None = None
    """Training of an editor (`editfleet train`), which edits nothing; null in every other job."""
    assess: AssessSpec | None = None
    """Assessment of facts (`editfleet assess`), which edits nothing; null in every other job."""
    output: OutputSpec = OutputSpec()
    seed: Seed = 0
    """Seed of everything that is drawn: generated contexts, the covariance's texts."""

    @model_validator(mode="after")
    def _check(self) -> "JobSpec":
        method = self.method
        asks = method.is_locating and method.kn.paraphrases
        if asks and "paraphrase" in self.evaluation.probes:
            raise ValueError(
                "method.kn.paraphrases: neurons that are looked for by paraphrases cannot be judged"
                " by them; leave paraphrase out of evaluation.probes"
            )
        return self

    @property
    def place(self) -> str:
        """Where the run is: a directory or a URL."""
        return self.output.path or str(Path("runs") / self.name)

    @property
    def url(self) -> str | None:
        """The URL that the run is at; None if it is in a directory."""
        return self.place if is_url(self.place) else None

    @property
    def run_path(self) -> Path:
        """The run directory; of a run at a URL, the driver's copy of it."""
        if self.url is None:
            return Path(self.place)
        return copy_directory(self.url, "driver", self.output.staging)

    @property
    def rolls_back(self) -> bool:
        """Whether every round begins at the unedited model."""
        return self.rounds is not None and self.rounds.rollback

    def at(self, place: Path | str) -> "JobSpec":
        """The same job with its run in another place."""
        output = self.output.model_copy(update={"path": str(place)})
        return self.model_copy(update={"output": output})

    def deciding(self) -> dict[str, Any]:
        """Every setting that decides the result, to its last bits, as path -> plain value."""
        content = _flat(self.model_dump(mode="json"))
        return {name: value for name, value in content.items() if name not in _FREE}

    def digest(self) -> str:
        """SHA-256 of what decides the result; cluster size and output place are left out."""
        content = json.dumps(self.deciding(), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def differences(self, earlier: "JobSpec") -> list[str]:
        """Each setting that makes this job another one than an earlier one, with both values."""
        before, now = earlier.deciding(), self.deciding()
        return [
            f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}"
            for name in now | before
            if before.get(name) != now.get(name)
        ]


# What may differ when a run is resumed: where and how widely it runs, which no bit of the result
# follows. Not among them are shard_size, value_batch_size, cpus_per_worker and reducer_threads.
# A new setting decides until it is put here.
_FREE = frozenset(
    {
        "name",
        "compare",
        "survey",
        "covariance.path",
        "cluster.engine",
        "cluster.address",
        "cluster.workers",
        "cluster.gpus_per_worker",
        "cluster.memory_per_worker_gb",
        "cluster.hidden_states_gb",
        "cluster.max_retries",
        "cluster.stall_seconds",
        "cluster.call_timeout_seconds",
        "method.max_drift",
        "output.keep_keys",
        "output.path",
        "output.staging",
        "output.save_model",
        "output.trackers",
        "output.on_divergence",
    }
)


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        below = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{name}": value} if below is None else below
    return flat


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
