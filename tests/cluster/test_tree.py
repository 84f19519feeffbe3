"""Keys summed in a tree on their way to the reducer: the same sums, whatever the tree."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cluster.shards import Shard
from pipeline.cluster.tree import groups_of, sum_in_tree
from pipeline.editing.sums import add_up, edits_for_sums, sum_keys
from tests.cases import relative_error


class _Here:
    """The part of an engine that a tree needs, which remembers how many parts it combined."""

    def __init__(self) -> None:
        self.fans: list[int] = []

    def combine(self, function: Callable[[Sequence[Any]], Any], references: Sequence[Any]) -> Any:
        self.fans.append(len(references))
        return function(references)


def _shards(sizes: Sequence[int]) -> list[Shard]:
    return [Shard(index, tuple(range(size))) for index, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 40))
def test_groups_follow_each_other_and_are_large_enough(sizes: list[int], key_size: int) -> None:
    groups = groups_of(_shards(sizes), key_size)
    assert [place for group in groups for place in group] == list(range(len(sizes)))
    if sum(sizes) < 8 * key_size:
        assert all(len(group) == 1 for group in groups)
    else:
        assert all(
            sum(sizes[place] for place in group) >= edits_for_sums(key_size) for group in groups
        )


def test_sums_are_sent_where_they_are_smaller() -> None:
    edits, key_size, width = edits_for_sums(6), 6, 4
    keys, residuals = torch.randn(edits, key_size), torch.randn(edits, width)
    sums = sum_keys([(keys, residuals)])
    assert sum(part.nbytes for part in sums) == keys.nbytes + residuals.nbytes


@pytest.mark.parametrize("count", [4, 9, 70])
def test_a_tree_adds_up_to_the_sums_of_all_keys(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shards = [
        (torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator))
        for _ in range(3 * count)
    ]
    engine = _Here()
    groups = [range(start, start + 3) for start in range(0, 3 * count, 3)]
    parts = sum_in_tree(engine, groups, dict(enumerate(shards)))  # type: ignore[arg-type]
    assert len(parts) <= 8 and max(engine.fans) <= 8
    keys = torch.cat([key for key, _ in shards]).double()
    residuals = torch.cat([residual for _, residual in shards]).double()
    total = add_up(parts)
    assert relative_error(total.gram_FF, keys.T @ keys) < 1e-14
    assert relative_error(total.cross_DF, residuals.T @ keys) < 1e-14
