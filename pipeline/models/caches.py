"""Attention keys and values of tokens that are computed once and read many times."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class AttentionCache(Cache):
    """Base of the caches below: a Hugging Face cache without growing layers of its own."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions and masks are always given explicitly, never derived from the cache."""
        return 0


class RecordingCache(AttentionCache):
    """Keeps what attention computes: layer -> keys and values (batch, heads, tokens, head size).

    Args:
        prefix: attention keys and values to supply in front, as `PrefixCache` does; not kept.
    """

    def __init__(self, prefix: dict[int, tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__()
        self.prefix = prefix
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.recorded[layer_idx] = (key_states, value_states)
        if self.prefix is None:
            return key_states, value_states
        return _in_front(self.prefix[layer_idx], key_states, value_states)


class GrowingCache(AttentionCache):
    """Keeps the attention keys and values of all calls, each in front of the next one's."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx in self._held:
            key_states, value_states = _in_front(self._held[layer_idx], key_states, value_states)
        self._held[layer_idx] = (key_states, value_states)
        return key_states, value_states


class PrefixCache(AttentionCache):
    """Supplies constant attention keys and values of a prefix in front of the tokens of a call."""

    def __init__(self, prefix: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.prefix = prefix

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return _in_front(self.prefix[layer_idx], key_states, value_states)


def _in_front(
    prefix: tuple[Tensor, Tensor], key_states: Tensor, value_states: Tensor
) -> tuple[Tensor, Tensor]:
    keys, values = prefix
    return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
