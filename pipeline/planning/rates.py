"""How fast a machine computes, and what becomes of pieces of work on several workers."""

import heapq
import time
from collections.abc import Sequence

import torch

from pipeline.models.kernels import wide_product

_SECONDS = 0.5
_TRIES = 20
_SIZE = {"cpu": 512, "cuda": 8192}


def matmul_rate(
    device: torch.device,
    dtype: torch.dtype,
    size: int | None = None,
    seconds: float = _SECONDS,
) -> float:
    """FLOP/s of a square product by the kernels that models use: the best of some tries.

    Args:
        device: where to measure; with the threads that torch has there.
        dtype: type of the matrices.
        size: rows of a matrix; null takes one that suits the device.
        seconds: end after this long, or after 20 tries.
    """
    size = _SIZE[device.type] if size is None else size
    left = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    right = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    best, spent, tries = float("inf"), 0.0, 0
    while tries == 0 or (spent < seconds and tries < _TRIES):
        _await(device)
        start = time.perf_counter()
        wide_product(left, right, None)
        _await(device)
        taken = time.perf_counter() - start
        best, spent, tries = min(best, taken), spent + taken, tries + 1
    return 2.0 * size**3 / best


def rate_as_busy(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOP/s of a model's square products over a while, with what else the machine does meanwhile.

    By the kernels that a model's linear maps use (`pipeline.models.kernels`).
    """
    size = _SIZE[device.type]
    left = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    wide_product(left, left, None)  # the first one loads the library
    _await(device)
    start, products = time.perf_counter(), 0
    while products == 0 or time.perf_counter() - start < seconds:
        wide_product(left, left, None)
        _await(device)
        products += 1
    return 2.0 * size**3 * products / (time.perf_counter() - start)


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last of these pieces ends, each taken in turn by the first worker that is free."""
    free = [0.0] * workers
    for piece in seconds:
        heapq.heapreplace(free, free[0] + piece)
    return max(free)


def crossing_seconds(
    key_bytes: float, update_bytes: float, workers: int, bytes_per_second: float
) -> float:
    """Seconds in which the keys and updates of an insertion cross the network, one link a node.

    All keys enter the reducer's node; an update leaves it once, and goes on from node to node, so
    that it crosses log2(W) links one after another.
    """
    if workers == 1:
        return 0.0
    hops = (workers - 1).bit_length()
    return (key_bytes + update_bytes * hops) / bytes_per_second


def _await(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
