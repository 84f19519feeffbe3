"""How requests and probes are cut into shards, whatever the number of workers."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from pipeline.cluster.shards import Shard
from pipeline.requests import EditRequest

# Enough shards to keep workers of unlike speed busy to the end, none too small for a batch.
MOST_SHARDS = 64
_SMALLEST_SHARD, _LARGEST_SHARD = 16, 256


def cut_shards(items: Sequence[Any], size: int | Literal["auto"]) -> list[Shard]:
    """Cut items into consecutive shards of at most `size`."""
    step = _shard_size(len(items), size)
    return [
        Shard(index, tuple(items[start : start + step]))
        for index, start in enumerate(range(0, len(items), step))
    ]


def cut_by_subject(requests: Sequence[EditRequest], size: int | Literal["auto"]) -> list[Shard]:
    """Cut requests into shards of at most `size` that hold all requests of their subjects.

    A subject of more requests is a shard of its own.
    """
    subjects = defaultdict(list)
    for request in requests:
        subjects[request.subject].append(request)
    step = _shard_size(len(requests), size)
    shards: list[list[EditRequest]] = []
    for found in subjects.values():
        if not shards or len(shards[-1]) + len(found) > step:
            shards.append([])
        shards[-1] += found
    return [Shard(index, tuple(found)) for index, found in enumerate(shards)]


def _shard_size(count: int, size: int | Literal["auto"]) -> int:
    automatic = min(max(-(-count // MOST_SHARDS), _SMALLEST_SHARD), _LARGEST_SHARD)
    return automatic if size == "auto" else size
