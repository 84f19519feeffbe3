"""Bytes that a worker, the reducer and the driver need, from the model's shapes."""

import os
from collections.abc import Mapping, Sequence

import torch

from pipeline.cluster.plan import Plan
from pipeline.cluster.reducer import KEPT_BYTES
from pipeline.cluster.worker import EDITS_PER_BATCH
from pipeline.editing.memory import free_bytes, value_bytes
from pipeline.models.editable import resolve_device
from pipeline.planning.outline import ModelOutline
from pipeline.prompts import EditPrompts
from pipeline.results.planned import Memory
from pipeline.spec import JobSpec

BASE_BYTES = 475_000_000
"""Python, torch, transformers and Ray in a process without a model. Measured: 0.474 GB."""
_REQUEST_BYTES = 8000
"""A request with its dozen probes as Python objects, texts and all; an assumption."""
_WIDE, _DOUBLE = 4, 8
_EDITED = "copies of edited weights"


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
        # The pristine weight, all updates' sum in float32, and one update on its way in.
        _EDITED: d * (sum(sizes) * (item + _WIDE) + largest * _DOUBLE),
        "activations of a value batch": activations,
        "hidden states and keys": int(min(kept, plan.spec.cluster.hidden_states_gb * 1e9)),
    }
    if computes_covariance:
        worker["covariance sums"] = sum(size * size for size in sizes) * _DOUBLE
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
        "requests": len(plan.rows) * _REQUEST_BYTES,
        "covariances": sum(size * size for size in sizes) * _DOUBLE,
        "values": round_edits * d * _WIDE,
    }
    return Memory(worker=worker, reducer=reducer, driver=driver)


def side_by_side(studies: Sequence[Memory]) -> Memory:
    """What studies that share their workers need: each has edited weights and a reducer of its own.

    A worker makes one call at a time, and one driver makes all studies.
    """

    def largest(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: max(part.get(name, 0) for part in parts) for name in names}

    worker = largest([study.worker for study in studies])
    worker[_EDITED] = sum(study.worker[_EDITED] for study in studies)
    return Memory(
        worker=worker,
        reducer=largest([study.reducer for study in studies]),
        driver=largest([study.driver for study in studies]),
    )


def _kept(sizes: Sequence[int]) -> int:
    return int(min(KEPT_BYTES, sum(2 * size * size * _DOUBLE for size in sizes)))


def update_bytes(edits: int, key_size: int, hidden_size: int) -> int:
    """Bytes of one update as it travels and is stored: factors, or dense where that is smaller."""
    return _WIDE * min(edits * (key_size + hidden_size), key_size * hidden_size)


def worker_share(spec: JobSpec) -> int | None:
    """Bytes that a worker on this machine could have; None where workers may be elsewhere.

    On a GPU that is the GPU's, one for each worker.
    """
    cluster = spec.cluster
    if cluster.address is not None or os.environ.get("RAY_ADDRESS"):
        return None
    device, _ = resolve_device()
    free = free_bytes(device)
    return free if device.type == "cuda" else free // local_workers(spec)


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
