"""Bytes that a worker, the reducer and the driver need, from the model's shapes."""

import os
from collections.abc import Mapping, Sequence

import torch

from pipeline.cluster.calls.base import EDITS_PER_BATCH
from pipeline.cluster.plan import Plan
from pipeline.cluster.reducer import KEPT_BYTES
from pipeline.editing.memory import free_bytes, value_bytes, value_parts
from pipeline.methods import build_adapter_method
from pipeline.models.editable import resolve_device
from pipeline.models.placement import Part, parts_of
from pipeline.planning.edit_memory import EditMemorySize
from pipeline.planning.outline import ModelOutline
from pipeline.prompts import CONTEXT_SEEDS, CONTEXT_TOKENS, EditPrompts, Row
from pipeline.results.planned import Memory, at_its_peak
from pipeline.spec import JobSpec

BASE_BYTES = 475_000_000
"""Python, torch, transformers and Ray in a process without a model. Measured: 0.474 GB."""
CONTEXT_BYTES = 600_000_000
"""CUDA's context and kernels in a process, on each of its GPUs; an assumption."""
# Of a request: a CounterFact prompt with its subject has about as many tokens; an assumption too.
_PROMPT_TOKENS, _TARGET_TOKENS = 20, 3
REQUEST_BYTES = 8000
"""A request with its dozen probes as Python objects, texts and all; an assumption."""
_WIDE, _DOUBLE = 4, 8
_EDITED = "copies of edited weights"
_OF_VALUES = ("activations of a value batch", "hidden states and keys")


def estimate_memory(
    plan: Plan,
    model: ModelOutline,
    edits: Sequence[EditPrompts],
    workers: int,
    batch: int,
    *,
    computes_covariance: bool,
) -> Memory:
    """Estimate what a job needs.

    Args:
        plan: the job.
        model: its model's shapes.
        edits: a sample of its requests.
        workers: how many workers share a round's hidden states.
        batch: edits that are searched at once.
        computes_covariance: whether the sums over a corpus are to be formed.
    """
    layers, d = plan.layers, model.hidden_size
    sizes = [model.key_size(layer) for layer in layers]
    largest, item = max(sizes), model.dtype.itemsize
    round_edits = max(sum(len(s.items) for s in shards) for shards in plan.rounds.shards)
    searched = [stage[-1] for stage in plan.stages]
    activations = batch * max(value_bytes(model, e, layer) for e in edits for layer in searched)
    # Tokens up to the subject's last one, in every context.
    tokens = sum(sum(row.lookup + 1 for row in edit.rewrites) for edit in edits) / len(edits)
    kept = tokens * (2 * d + largest) * item * round_edits / workers
    worker = {
        "process": BASE_BYTES,
        "weights": model.num_parameters * item,
        _EDITED: edited_bytes(model, layers),
        "activations of a value batch": activations,
        "hidden states and keys": int(min(kept, plan.spec.cluster.hidden_states_gb * 1e9)),
    }
    if plan.spec.method.is_piecewise:
        queries = build_adapter_method(plan.spec.method).num_queries
        worker["remembered queries"] = queries * d * _WIDE
    if plan.spec.method.is_memory:
        # No value is searched, no weight changes.
        beside = EditMemorySize.of(plan.spec.method.serac, model, edits)
        worker = {name: size for name, size in worker.items() if name not in _OF_VALUES}
        worker[_EDITED] = 0
        worker["models of the memory"] = beside.weight_bytes
        worker["edits in the memory"] = plan.num_requests * beside.edit_bytes
    if computes_covariance:
        worker["covariance sums"] = sum(size * size for size in sizes) * _DOUBLE
    gpus = plan.spec.cluster.gpus_per_worker
    spread = gpus != "auto" and gpus > 1
    square = largest * largest * _DOUBLE
    waiting = round_edits * (largest + d) * _DOUBLE
    reducer = {
        "process": BASE_BYTES,
        "F x F matrices": 4 * square,
        "keys and residuals": min(waiting, square + largest * d * _DOUBLE),
        "kept for the next round": _kept(sizes) if plan.spec.rounds is not None else 0,
    }
    driver = {
        "process": BASE_BYTES,
        "requests": len(plan.rows) * REQUEST_BYTES,
        "covariances": sum(size * size for size in sizes) * _DOUBLE,
        "values": round_edits * d * _WIDE,
    }
    gpu = gpu_memory(plan.spec, model, edits, batch, int(gpus)) if spread else {}
    return Memory(worker=worker, reducer=reducer, driver=driver, gpu=gpu)


def gpu_memory(
    spec: JobSpec, model: ModelOutline, edits: Sequence[EditPrompts], batch: int, count: int
) -> dict[str, int]:
    """Bytes of the fullest GPU of a worker that has so many, by what they are for.

    Args:
        spec: the resolved spec.
        model: the model's shapes.
        edits: a sample of requests.
        batch: edits that are searched at once.
        count: GPUs.

    Raises:
        InputError: there are more GPUs than blocks.
    """
    layers, stages = spec.method.layers or (), spec.method.stages
    searches = [value_parts(model, edit, stage[-1]) for edit in edits for stage in stages if stage]

    def held(part: Part) -> dict[str, int]:
        own = [layer for layer in layers if layer in part.blocks]
        over = (one.over(part.blocks, with_logits=part.has_logits) for one in searches)
        return {
            "process": CONTEXT_BYTES,
            "weights": part.weight_bytes,
            _EDITED: edited_bytes(model, own),
            "activations of a value batch": batch * max(over, default=0),
            "hidden states and keys": int(spec.cluster.hidden_states_gb * 1e9) if own else 0,
            "covariance sums": sum(model.key_size(layer) ** 2 for layer in own) * _DOUBLE,
        }

    return max(map(held, parts_of(model.model, count)), key=at_its_peak)


def ordinary_edit(spec: JobSpec) -> EditPrompts:
    """A request of ordinary length, for where the requests are not known."""
    contexts = 1 + len(CONTEXT_SEEDS) if spec.method.contexts is None else len(spec.method.contexts)
    row = Row((0,) * (CONTEXT_TOKENS + _PROMPT_TOKENS), CONTEXT_TOKENS + _PROMPT_TOKENS // 2)
    return EditPrompts((row,) * contexts, (0,) * _TARGET_TOKENS, row, "")


def edited_bytes(model: ModelOutline, layers: Sequence[int]) -> int:
    """Pristine weights, all updates' sums in float32, and one update on its way in."""
    sizes = [model.key_size(layer) for layer in layers]
    kept = sum(sizes) * (model.dtype.itemsize + _WIDE)
    return model.hidden_size * (kept + max(sizes, default=0) * _DOUBLE)


def side_by_side(studies: Sequence[Memory]) -> Memory:
    """What studies that share their workers need: each has edited weights and a reducer of its own.

    A worker makes one call at a time, and one driver makes all studies.
    """

    def largest(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: max(part.get(name, 0) for part in parts) for name in names}

    def of_all(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
        found = largest(parts)
        if found:
            found[_EDITED] = sum(part.get(_EDITED, 0) for part in parts)
        return found

    return Memory(
        worker=of_all([study.worker for study in studies]),
        reducer=largest([study.reducer for study in studies]),
        driver=largest([study.driver for study in studies]),
        gpu=of_all([study.gpu for study in studies]),
    )


def largest_memory(studies: Sequence[Memory]) -> Memory:
    """Of the study whose workers need the most, where one is made after another."""
    return max(studies, key=lambda memory: memory.worker_bytes)


def _kept(sizes: Sequence[int]) -> int:
    return int(min(KEPT_BYTES, sum(2 * size * size * _DOUBLE for size in sizes)))


def update_bytes(edits: int, key_size: int, hidden_size: int) -> int:
    """Bytes of one update as it travels and is stored: factors, or dense where that is smaller."""
    return _WIDE * min(edits * (key_size + hidden_size), key_size * hidden_size)


def worker_share(spec: JobSpec) -> int | None:
    """Bytes that a worker on this machine could have; None where workers may be elsewhere.

    On GPUs that is one GPU's, or the worker's part of it.
    """
    cluster = spec.cluster
    if cluster.address is not None or os.environ.get("RAY_ADDRESS"):
        return None
    device, _ = resolve_device()
    gpus = cluster.gpus_per_worker
    if device.type == "cuda":
        return free_bytes(device, 1.0 if gpus == "auto" or not 0 < gpus < 1 else gpus)
    return free_bytes(device) // local_workers(spec)


def local_workers(spec: JobSpec) -> int:
    """Workers of a job on this machine, without GPUs."""
    cluster = spec.cluster
    if cluster.engine == "in_process":
        return 1
    here = len(os.sched_getaffinity(0)) // cluster.cpus_per_worker
    return max(1, here) if cluster.workers == "auto" else cluster.workers


def batch_size(plan: Plan, device: torch.device) -> int:
    """Edits that a worker searches at once, if memory allows."""
    asked = plan.spec.cluster.value_batch_size
    largest = max(len(shard.items) for shard in plan.shards)
    return min(largest, EDITS_PER_BATCH[device.type] if asked == "auto" else asked)
