"""JobSpec: the one definition of every setting, its default, its bounds and its help text."""

import difflib
import hashlib
import json
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import InputError
from pipeline.setting_types import Finite, NonNegative, Place, Positive, Seed, Text, Threads
from pipeline.yaml_text import parse_yaml, read_yaml

Probe = Literal["rewrite", "paraphrase", "neighborhood", "locality", "portability"]
DataType = Literal["auto", "float32", "bfloat16", "float16"]

_LONGEST_SHOWN = 200


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )


class ModelSpec(_Part):
    """The model to edit."""

    path: Place = "factworld"
    """Local directory or Hugging Face hub id; `factworld` is the small model inside the package."""
    dtype: DataType = "auto"
    """Type of the weights while computing; `auto` takes the checkpoint's (float32 where a processor
    would have to compute in float16). Edited weights always keep a float32 master."""
    revision: Place | None = None
    """Hub revision (branch, tag or commit)."""
    allow_pickle: bool = False
    """Load weights from pickled .bin files where there are no safetensors."""


class RequestsSpec(_Part):
    """The edit requests to read."""

    path: Place = "factworld"
    """File, directory or data set name; `factworld` generates requests for the embedded model."""
    format: Text = "auto"
    """counterfact, zsre, easyedit, jsonl, parquet, dataset, or auto."""
    limit: Positive | None = None
    """Read at most this many records."""
    offset: NonNegative = 0
    """Skip this many records first."""
    shuffle_seed: int | None = None
    """Shuffle the whole file by this seed before offset and limit; null keeps the file's order."""
    on_conflict: Literal["refuse", "last", "first", "error"] = "refuse"
    """What to do with requests that have the same subject and prompt and different targets: refuse
    all of them, keep the last, keep the first, or stop the job."""


class ValueSpec(_Part):
    """The search for a value z (MEMIT, arXiv 2210.07229, equation 16)."""

    steps: Positive | None = None
    """Forward passes at most; the last one takes no gradient step."""
    learning_rate: Annotated[Finite, Field(gt=0)] | None = None
    """Adam's learning rate."""
    weight_decay: Annotated[Finite, Field(ge=0)] | None = None
    """Weight of ||delta|| / ||h0||^2 in the loss."""
    kl_weight: Annotated[Finite, Field(ge=0)] | None = None
    """Weight of the KL divergence at the subject's last token of "{subject} is a"."""
    clamp_norm: Annotated[Finite, Field(gt=0)] | None = None
    """||delta|| is kept at or below this many times ||h0||."""
    stop_loss: Annotated[Finite, Field(ge=0)] | None = None
    """Stop an edit's search when its loss is below this."""
    stop_when_predicted: bool = False
    """Stop it also once the target is the model's argmax in every context (ENCORE, arXiv
    2502.01636): faster, and another value than the published procedure's."""
    loss_layer: NonNegative | None = None
    """Block whose output the loss is read from; only the last one (null) is supported."""


class MethodSpec(_Part):
    """How to edit. Settings left null come from the model's published defaults."""

    name: Literal["memit"] = "memit"
    """Editing method."""
    layers: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = None
    """Blocks whose MLP down-projection is edited, ascending."""
    covariance_weight: Annotated[Finite, Field(gt=0)] | None = None
    """Lambda in (lambda C + K K^T): how strongly old keys are protected."""
    max_drift: Annotated[Finite, Field(gt=0)] = 2.0
    """The job has diverged when an update moves a layer's output at ordinary tokens by more than
    this many times a hidden state's length. Sound batches stay below 0.5, and ten times too many
    edits at about that."""
    contexts: tuple[Text, ...] | None = None
    """Context templates with one {} each; the first one alone in its group. Null generates them
    from the model with `seed`."""
    value: ValueSpec = ValueSpec()
    """The value search."""

    @model_validator(mode="after")
    def _check(self) -> "MethodSpec":
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend without repetition, got {list(self.layers)}")
        for context in self.contexts or ():
            if context.count("{}") != 1:
                raise ValueError(f"contexts: {context!r} must hold {{}} exactly once")
        if self.contexts is not None and not self.contexts:
            raise ValueError("contexts: an empty list; give at least '{}', or null to generate")
        return self


class CovarianceSpec(_Part):
    """The uncentred covariance of keys, C = mean of k k^T over the tokens of a corpus."""

    corpus: Place | None = None
    """Text file (one text a line), .json list, .jsonl, .parquet, a Hugging Face data set, or
    `factworld`."""
    field: Text = "text"
    """Column with the text, where the corpus has columns."""
    samples: Positive | Literal["auto"] | None = None
    """Texts to use, drawn by `seed`; `auto` takes about 10 tokens for every entry of a key, null
    the model's published default, or all."""
    max_tokens: Positive | None = None
    """Cut every text to this many tokens; null cuts at the model's context."""
    path: Place | None = None
    """Directory to keep covariances in, or one with the .npz files of the public MEMIT code; null
    is editfleet/covariance in the user's cache directory."""


class ClusterSpec(_Part):
    """Where and how widely to run."""

    engine: Literal["ray", "in_process"] = "ray"
    """`in_process` runs one worker inside the driver, without Ray."""
    address: Place | None = None
    """Null starts Ray on this machine, or joins the cluster that RAY_ADDRESS names (as in a
    submitted job); `auto` or an address joins a running cluster."""
    workers: Positive | Literal["auto"] = "auto"
    """Worker actors; `auto` takes as many as the cluster's processors (or GPUs) allow."""
    cpus_per_worker: Threads = 1
    """Processors, and so compute threads, a worker has."""
    gpus_per_worker: Annotated[Finite, Field(ge=0)] | Literal["auto"] = "auto"
    """GPUs a worker has; `auto` is 1 where the cluster has GPUs, else 0."""
    reducer_threads: Threads = 2
    """Compute threads of the reducer. Part of the result's last bits, so it is not guessed."""
    shard_size: Positive | Literal["auto"] = "auto"
    """Requests a shard; `auto` makes about 64 shards of 16 to 256 requests. Part of the result's
    last bits, so it does not follow the worker count."""
    value_batch_size: Positive | Literal["auto"] = "auto"
    """Edits searched at once inside a worker; halved on running out of memory. `auto` is 16 on a
    processor, where activations should stay in its cache, and 256 on a GPU."""
    hidden_states_gb: Annotated[Finite, Field(ge=0)] = 1.0
    """Gigabytes of hidden states that a worker keeps between layers; beyond it they are computed
    again, to the same bits."""
    max_retries: NonNegative = 3
    """Times that a shard is tried again after an infrastructure error."""
    stall_seconds: Annotated[Finite, Field(gt=0)] = 120.0
    """Say which shards have been out for longer than this, and for how long."""
    call_timeout_seconds: Annotated[Finite, Field(gt=0)] | None = None
    """Take a worker for lost that has not answered a call for this long: it is killed and replaced,
    and its shard is tried again. Give it more than the slowest shard and loading the model take;
    null waits for ever."""


class EvaluationSpec(_Part):
    """What to score on the model, before and after."""

    probes: tuple[Probe, ...] = ("rewrite", "paraphrase", "neighborhood")
    """Kinds of probe; an empty list skips the evaluation."""
    generate: bool = False
    """Also generate greedily from every rewrite and paraphrase probe, without the target in it."""
    generate_tokens: Positive = 12
    """Tokens to generate at most."""
    baseline: bool = True
    """Score the unedited model too."""


class OutputSpec(_Part):
    """What to leave behind."""

    path: Place | None = None
    """The run directory; null is runs/<name>."""
    save_model: bool = False
    """Write the edited model to model/ in the run directory."""
    on_divergence: Literal["stop", "keep"] = "stop"
    """What to do when the edits ruin the model (see `method.max_drift` and docs/design.md): stop
    before it is written, or keep it with a warning. Numbers that are not finite always stop."""


class JobSpec(_Part):
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
    output: OutputSpec = OutputSpec()
    seed: Seed = 0
    """Seed of everything that is drawn: generated contexts, the covariance's texts."""

    @property
    def run_path(self) -> Path:
        """The run directory."""
        return Path(self.output.path or Path("runs") / self.name)

    def at(self, path: Path) -> "JobSpec":
        """The same job with another run directory."""
        output = self.output.model_copy(update={"path": str(path)})
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
        "covariance.path",
        "cluster.engine",
        "cluster.address",
        "cluster.workers",
        "cluster.gpus_per_worker",
        "cluster.hidden_states_gb",
        "cluster.max_retries",
        "cluster.stall_seconds",
        "cluster.call_timeout_seconds",
        "method.max_drift",
        "output.path",
        "output.save_model",
        "output.on_divergence",
    }
)


def load_spec(path: str | Path | None, overrides: list[str] | None = None) -> JobSpec:
    """Read a YAML spec and apply `field.path=value` overrides (values are YAML).

    Raises:
        InputError: the file cannot be read, an override is malformed, or a setting is wrong; the
            message names the setting and, for an unknown one, the nearest known name.
    """
    content = {} if path is None else read_yaml(Path(path))
    for override in overrides or []:
        _override(content, override)
    return parse_spec(content, "the settings" if path is None else str(path))


def parse_spec(content: Any, source: str) -> JobSpec:
    """Validate a spec given as plain data; `source` names it in errors (InputError)."""
    if not isinstance(content, dict):
        raise InputError(f"{source}: a spec is a mapping of settings, got {type(content).__name__}")
    try:
        return JobSpec.model_validate(content)
    except ValidationError as error:
        raise InputError(_explain(error, source)) from error


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        below = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        flat |= {f"{prefix}{name}": value} if below is None else below
    return flat


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise InputError(f"--set {override!r:.200}: write it as field.path=value")
    try:
        value = parse_yaml(text)
    except InputError as error:
        raise InputError(f"--set {override!r:.200}: the value is {error}") from error
    *parents, leaf = name.strip().split(".")
    place = content
    for parent in parents:
        below = place.setdefault(parent, {})
        if not isinstance(below, dict):
            raise InputError(
                f"--set {override!r:.200}: {parent} is a value, not a group of settings"
            )
        place = below
    place[leaf] = value


def _explain(error: ValidationError, source: str) -> str:
    """One line for the first problem, and how many more there are."""
    problems = {_place(problem["loc"]): problem for problem in reversed(error.errors())}
    where, first = next(reversed(problems.items()))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown setting{_did_you_mean(first['loc'])}"
    elif first["type"] != "value_error":
        message = f"{message}, got {reprlib.repr(first['input']):.80}"
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{source}: {where}: {message}{more}"


def _place(location: tuple[int | str, ...]) -> str:
    """The setting's path; the names of alternatives in a union are left out."""
    names: list[str] = []
    part: type[BaseModel] | None = JobSpec
    for name in location:
        if part is None:
            # Below a plain setting only positions in a list are worth saying.
            names += [str(name)] if isinstance(name, int) else []
            continue
        names.append(str(name))
        field = part.model_fields.get(str(name))
        annotation: Any = None if field is None else field.annotation
        is_part = isinstance(annotation, type) and issubclass(annotation, BaseModel)
        part = annotation if is_part else None
    return ".".join(names) or "spec"


def _did_you_mean(location: tuple[int | str, ...]) -> str:
    part: type[BaseModel] = JobSpec
    for name in location[:-1]:
        annotation = part.model_fields[str(name)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        part = annotation
    near = difflib.get_close_matches(str(location[-1]), part.model_fields, n=1)
    known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(part.model_fields)}"
    return f"; {known}"
