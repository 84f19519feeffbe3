"""Attention masks against plain loops."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.masks import attention_masks, plain_segments


@st.composite
def _tokens(draw: st.DrawFn) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
    """Positions and (own, continued) segments of one to three rows of equal width."""
    width = draw(st.integers(1, 7))
    number = st.integers(-2, 3)
    positions = [
        [draw(st.integers(0, 9)) for _ in range(width)] for _ in range(draw(st.integers(1, 3)))
    ]
    segments = [[(draw(number), draw(number)) for _ in range(width)] for _ in positions]
    return positions, segments


@given(
    tokens=_tokens(),
    window=st.one_of(st.none(), st.integers(1, 6)),
    start=st.integers(0, 6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_token_sees_the_earlier_tokens_of_its_texts(
    tokens: tuple[list[list[int]], list[list[tuple[int, int]]]],
    window: int | None,
    start: int,
    dtype: torch.dtype,
) -> None:
    positions, segments = tokens
    width = len(positions[0])
    start = min(start, width - 1)
    masks = attention_masks(
        SimpleNamespace(sliding_window=window),
        torch.tensor(positions),
        torch.tensor(segments),
        start,
        dtype,
    )
    for kind, limit in (("full_attention", None), ("sliding_attention", window)):
        mask = masks[kind]
        assert mask.dtype == dtype
        assert mask.shape == (len(positions), 1, width - start, width)
        assert torch.isfinite(mask.float()).all()
        for row, (places, own) in enumerate(zip(positions, segments, strict=True)):
            for query in range(start, width):
                for key in range(width):
                    back = places[query] - places[key]
                    expected = (
                        own[key][0] >= 0
                        and own[key][0] in own[query]
                        and back >= 0
                        and (limit is None or back < limit)
                    )
                    value = mask[row, 0, query - start, key].item()
                    assert (value == 0.0) if expected else (value < -6e4)


def test_a_model_without_a_window_has_one_mask() -> None:
    positions = torch.arange(4).expand(1, 4)
    segments = plain_segments(torch.tensor([4]), 4)
    masks = attention_masks(SimpleNamespace(), positions, segments, 0, torch.float32)
    assert torch.equal(masks["sliding_attention"], masks["full_attention"])
    assert torch.equal(masks["full_attention"][0, 0] == 0, torch.ones(4, 4).tril() == 1)


def test_a_window_counts_the_token_itself() -> None:
    positions = torch.arange(5).expand(1, 5)
    segments = plain_segments(torch.tensor([5]), 5)
    config = SimpleNamespace(sliding_window=2)
    mask = attention_masks(config, positions, segments, 0, torch.float32)["sliding_attention"]
    assert (mask[0, 0] == 0).sum(dim=-1).tolist() == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("lengths", [[3, 1, 5], [5], [1, 1]])
def test_plain_segments_mark_padding(lengths: list[int]) -> None:
    segments = plain_segments(torch.tensor(lengths), 5)
    assert segments.shape == (len(lengths), 5, 2)
    for row, length in zip(segments.tolist(), lengths, strict=True):
        assert row == [[0, 0]] * length + [[-1, -1]] * (5 - length)
