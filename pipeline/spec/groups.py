"""Settings of everything around the method: what is edited, where it runs, what is left behind."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.setting_types import (
    Directory,
    Finite,
    Gpus,
    NonNegative,
    Place,
    Positive,
    RunPlace,
    Text,
    Threads,
)
from pipeline.spec.part import Part

Probe = Literal["rewrite", "paraphrase", "neighborhood", "locality", "portability", "generation"]
Tracker = Literal["mlflow", "wandb"]
DataType = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSpec(Part):
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


class RequestsSpec(Part):
    """The edit requests to read."""

    path: Place = "factworld"
    """File, directory or data set name; `factworld` generates requests for the embedded model."""
    format: Text = "auto"
    """counterfact, zsre, easyedit, mquake, jsonl, parquet, dataset, or auto."""
    limit: Positive | None = None
    """Read at most this many records."""
    offset: NonNegative = 0
    """Skip this many records first."""
    shuffle_seed: int | None = None
    """Shuffle the whole file by this seed before offset and limit; null keeps the file's order."""
    on_conflict: Literal["refuse", "last", "first", "error"] = "refuse"
    """What to do with requests that have the same subject and prompt and different targets: refuse
    all of them, keep the last, keep the first, or stop the job."""


class CovarianceSpec(Part):
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
    path: Directory | None = None
    """Directory to keep covariances in, or one with the .npz files of the public MEMIT code; null
    is editfleet/covariance in the user's cache directory."""


class ClusterSpec(Part):
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
    memory_per_worker_gb: Annotated[Finite, Field(gt=0)] | None = None
    """Gigabytes of a node's memory that Ray sets aside for a worker, which it then places only
    where so much is left; `editfleet plan` says what a worker needs. Null sets nothing aside: a
    node takes as many workers as it has processors (or GPUs) for."""
    gpus_per_worker: Gpus | Literal["auto"] = "auto"
    """GPUs a worker has: 2, 3, ... spread one copy of the model over so many (docs/cluster.md),
    0.25 or 0.5 let workers share one. `auto` is 0 where there are no GPUs, else what an estimate of
    the worker's memory asks for; the log says why."""
    reducer_threads: Threads = 2
    """Compute threads of the reducer. Part of the result's last bits, so it is not guessed."""
    reducer_gpus: Annotated[Finite, Field(gt=0)] | None = None
    """GPUs, or what share of one, the reducer has on Ray; null leaves it to its threads. Part of
    the result's last bits. Merging many edits into wide layers is float64 work that all workers
    wait for (docs/scaling.md)."""
    shard_size: Positive | Literal["auto"] = "auto"
    """Requests a shard; `auto` makes about 64 shards of 16 to 256 requests. Part of the result's
    last bits, so it does not follow the worker count."""
    value_batch_size: Positive | Literal["auto"] = "auto"
    """Edits searched at once inside a worker; halved on running out of memory. `auto` is 16 on a
    processor, where activations should stay in its cache, and 256 on a GPU, or the power of two
    below that which fits into half of the free memory."""
    cuda_graphs: bool = False
    """Replay the value search's passes as CUDA graphs, on a GPU: fewer launches, for the same
    values to rounding. Where a model cannot be recorded, the log says so and passes run one by
    one."""
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


class GeneralSpec(Part):
    """What the rest of the model lost: held-out text on which to measure it, before and after."""

    corpus: Place | None = None
    """Held-out texts, in any form that `covariance.corpus` takes; null measures nothing. Take other
    texts than those of the covariance. Texts that name an edited subject are left out."""
    field: Text = "text"
    """Column with the text, where the corpus has columns."""
    texts: Positive = 500
    """Texts to use, drawn by `seed`."""
    max_tokens: Positive | None = 256
    """Cut every text to this many tokens; null cuts at the model's context."""


class EvaluationSpec(Part):
    """What to score on the model, before and after."""

    probes: tuple[Probe, ...] = ("rewrite", "paraphrase", "neighborhood")
    """Kinds of probe; an empty list skips the evaluation. `generation` continues the generation
    prompts of the requests, to measure fluency."""
    unchanged: tuple[Literal["locality", "neighborhood"], ...] = ("locality",)
    """Of which probes the unedited model's answer is asked too, to say whether it has changed."""
    generate: bool = False
    """Also generate greedily from every rewrite and paraphrase probe, without the target in it."""
    generate_tokens: Positive = 12
    """Tokens to generate at most."""
    fluency_tokens: Positive = 100
    """Tokens to continue a generation probe by, at most."""
    baseline: bool = True
    """Score the unedited model too."""
    general: GeneralSpec = GeneralSpec()
    """What the rest of the model lost."""


class OutputSpec(Part):
    """What to leave behind."""

    path: RunPlace | None = None
    """The run directory, or a URL of an object store (s3://BUCKET/PATH, gs://BUCKET/PATH) that is
    kept as a copy on the driver's machine is (docs/cluster.md); null is runs/<name>."""
    staging: Directory | None = None
    """Where the copy of a run at a URL is kept; null is editfleet/runs in the user's cache
    directory."""
    save_model: bool = False
    """Write the edited model to model/ in the run directory."""
    trackers: tuple[Tracker, ...] = ()
    """Where `editfleet edit` and `sequential` also log settings, scores and the report once the run
    is finished: mlflow, wandb (docs/watching.md). `editfleet track RUN` does it afterwards."""
    on_divergence: Literal["stop", "keep"] = "stop"
    """What to do when the edits ruin the model (see `method.max_drift` and docs/design.md): stop
    before it is written, or keep it with a warning. Numbers that are not finite always stop."""
    keep_keys: bool | Literal["auto"] = "auto"
    """Keep the keys and residuals of a batch, which `editfleet unedit` needs. `auto` does while
    they take no more room than the updates: N (F + D) numbers a layer against F D, for N edits. A
    study keeps its own in any case, since it goes on from them."""
