"""Many shards' keys on their way to the reducer: summed in a tree where that makes them smaller.

The tree follows from the plan alone, so that the result does not depend on the number of workers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cluster.engine import Engine
from pipeline.cluster.shards import Shard
from pipeline.editing.sums import add_up, edits_for_sums, sum_keys

FAN_IN = 8
"""Parts that are added at one place: of more, the reducer would receive and add too many alone."""
_FEWEST_GROUPS = 4


def groups_of(shards: Sequence[Shard], key_size: int) -> list[range]:
    """Cut shards into groups whose sums are smaller than their keys; one a shard where none is.

    Args:
        shards: the shards of keys, in the plan's order.
        key_size: F.

    Returns:
        Consecutive places in `shards`.
    """
    wanted = edits_for_sums(key_size)
    if sum(len(shard.items) for shard in shards) < _FEWEST_GROUPS * wanted:
        return [range(place, place + 1) for place in range(len(shards))]
    groups, start, edits = [], 0, 0
    for place, shard in enumerate(shards):
        edits += len(shard.items)
        if edits >= wanted:
            groups.append(range(start, place + 1))
            start, edits = place + 1, 0
    return [*groups[:-1], range(groups[-1].start, len(shards))]


def sum_in_tree(
    engine: Engine, groups: Sequence[range], references: Mapping[int, Any]
) -> list[Any]:
    """Sum every group's keys, then sums eight by eight until no more than eight are left.

    Args:
        engine: where it is done, spread over the cluster.
        groups: what `groups_of` returned, of more than one shard each.
        references: place of a shard -> its (keys, residuals).

    Returns:
        References of `Sums`, in order.
    """
    sums = [engine.combine(sum_keys, [references[place] for place in group]) for group in groups]
    while len(sums) > FAN_IN:
        parts = [sums[start : start + FAN_IN] for start in range(0, len(sums), FAN_IN)]
        sums = [engine.combine(add_up, part) if len(part) > 1 else part[0] for part in parts]
    return sums
