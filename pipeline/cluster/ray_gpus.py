"""The GPUs of a Ray cluster, by its nodes."""

from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.gpus import Gpus, visible_bytes
from pipeline.errors import InputError

_PATIENCE_SECONDS = 120.0
# Enough to be given a GPU, and too little to keep a worker from one.
_GLANCE = 0.001


def node_gpus() -> list[float]:
    """GPUs of each node that has any."""
    return [count for _, count in _nodes()]


def find_gpus() -> Gpus:
    """Ask every node with GPUs what memory one has.

    Raises:
        InputError: they do not answer, since others hold them, or torch finds none there.
    """
    ask = ray.remote(num_cpus=0, num_gpus=_GLANCE, max_retries=0)(visible_bytes)
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node, _ in _nodes()
    ]
    hint = "give cluster.gpus_per_worker"
    try:
        found: list[int] = ray.get(asked, timeout=_PATIENCE_SECONDS)
    except GetTimeoutError as error:
        for call in asked:
            ray.cancel(call, force=True)
        raise InputError(
            f"cluster.gpus_per_worker: no GPU was free to be asked for its memory for"
            f" {_PATIENCE_SECONDS:.0f} s, by which `auto` goes; {hint}"
        ) from error
    if not all(found):
        raise InputError(
            "cluster.gpus_per_worker: Ray has GPUs on a node where torch sees none, so `auto` has"
            f" nothing to go by; {hint} (0 computes on processors)"
        )
    return Gpus(min(found), int(max(node_gpus())))


def _nodes() -> list[tuple[Any, float]]:
    counts = [
        (node["NodeID"], float(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return [(node, count) for node, count in counts if count >= 1]
