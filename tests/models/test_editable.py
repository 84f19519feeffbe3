"""Entering and leaving a model between blocks gives what the whole model gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from pipeline.models.caches import PrefixCache, RecordingCache
from pipeline.models.editable import EditableModel, resolve_device
from pipeline.models.masks import plain_segments
from tests.cases import ALL_FAMILIES, case, fresh

LENGTHS = [14, 9, 3]
WIDTH = max(LENGTHS)
_SMALL: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GATED = _SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}

# Released models of the supported families that differ from the table's tiny ones.
VARIANTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt-350m: projections around narrower embeddings, norms after": lambda: OPTConfig(
        **_SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "mistral without a window": lambda: MistralConfig(**_GATED, sliding_window=None),
    "phi3 without a window": lambda: Phi3Config(**_GATED, sliding_window=None),
    "qwen2 without a window": lambda: Qwen2Config(**_GATED, use_sliding_window=False),
    "llama 3.1: scaled rotary positions": lambda: LlamaConfig(
        **_GATED,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "gpt2: attention scaled by layer": lambda: GPT2Config(
        **_SMALL, n_inner=48, scale_attn_by_inverse_layer_idx=True
    ),
}


class Whole:
    """A padded batch, and what the whole model makes of each row by itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, 397, (len(LENGTHS), WIDTH), generator=generator)
        self.positions = torch.arange(WIDTH).expand(len(LENGTHS), WIDTH)
        self.segments = plain_segments(torch.tensor(LENGTHS), WIDTH)
        with torch.no_grad():
            rows = [
                model(input_ids=self.ids[row : row + 1, :length], output_hidden_states=True)
                for row, length in enumerate(LENGTHS)
            ]
        self.logits = [row.logits[0] for row in rows]
        # states[row][i]: input of block i; the one behind the last block is behind the norm too.
        self.states = [[state[0] for state in row.hidden_states] for row in rows]

    def differ(self, actual: Tensor, expected: list[Tensor], start: int = 0) -> float:
        """Largest difference over real tokens from `start` on; `actual` begins at `start`."""
        return max(
            float((actual[row, : length - start] - expected[row][start:]).abs().max())
            for row, length in enumerate(LENGTHS)
            if length > start
        )


def _check_every_split(editable: EditableModel, tolerance: float) -> None:
    whole = Whole(editable.model)
    masks = editable.masks(whole.positions, whole.segments)
    common = {"masks": masks, "position_ids": whole.positions}
    depth = editable.num_blocks
    with torch.no_grad():
        for split in range(1, depth + 1):
            hidden = editable.run(None, first=0, stop=split, input_ids=whole.ids, **common)
            if split < depth:
                expected = [states[split] for states in whole.states]
                assert whole.differ(hidden, expected) < tolerance
            for middle in range(split, depth + 1):
                between = editable.run(hidden, first=split, stop=middle, **common)
                final = editable.final(between, first=middle, **common)
                last = [states[-1] for states in whole.states]
                if final.shape[-1] == last[0].shape[-1]:
                    assert whole.differ(final, last) < tolerance
                assert whole.differ(editable.logits(final), whole.logits) < tolerance
        straight = editable.final(None, first=0, input_ids=whole.ids, **common)
        assert whole.differ(editable.logits(straight), whole.logits) < tolerance


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_any_split_equals_the_whole_model(family: str) -> None:
    _check_every_split(case(family).editable, case(family).tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_family_split_as_well(variant: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(VARIANTS[variant](), dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    _check_every_split(EditableModel(model), 1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("first", [0, 1, 3, 4])
@pytest.mark.parametrize("cut", [1, 2, 11])
def test_a_prefix_cache_stands_for_the_tokens_before(family: str, first: int, cut: int) -> None:
    editable = case(family).editable
    whole = Whole(editable.model)
    masks = editable.masks(whole.positions, whole.segments)
    common: dict[str, Any] = {"masks": masks, "position_ids": whole.positions}
    before = {"position_ids": whole.positions[:, :cut]}
    after = {"position_ids": whole.positions[:, cut:]}
    before["masks"] = editable.masks(whole.positions[:, :cut], whole.segments[:, :cut])
    after["masks"] = editable.masks(whole.positions, whole.segments, query_start=cut)
    recorder = RecordingCache()
    with torch.no_grad():
        hidden = editable.run(None, first=0, stop=max(first, 1), input_ids=whole.ids, **common)
        if first == 0:
            ids_before, ids_after = whole.ids[:, :cut], whole.ids[:, cut:]
            editable.final(None, first=0, input_ids=ids_before, cache=recorder, **before)
            prefix = PrefixCache(recorder.recorded)
            final = editable.final(None, first=0, input_ids=ids_after, cache=prefix, **after)
        else:
            editable.final(hidden[:, :cut], first=first, cache=recorder, **before)
            prefix = PrefixCache(recorder.recorded)
            final = editable.final(hidden[:, cut:], first=first, cache=prefix, **after)
    assert sorted(recorder.recorded) == list(range(first, 4))
    assert whole.differ(editable.logits(final), whole.logits, cut) < case(family).tolerance


def test_an_empty_range_returns_the_state_itself() -> None:
    editable = case("gpt2").editable
    hidden = torch.randn(1, 2, 32, dtype=torch.float64)
    for block in (0, 2, 4):
        same = editable.run(
            hidden, first=block, stop=block, masks=None, position_ids=torch.arange(2)[None]
        )
        assert same is hidden


def test_entering_above_the_first_block_needs_a_state() -> None:
    editable = case("gpt2").editable
    with pytest.raises(ValueError, match="hidden state"):
        editable.run(None, first=1, stop=2, masks=None, position_ids=torch.arange(2)[None])


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma3"])
def test_a_state_enters_at_block_0_in_place_of_the_embeddings(family: str) -> None:
    editable = case(family).editable
    whole = Whole(editable.model)
    masks = editable.masks(whole.positions, whole.segments)
    with torch.no_grad():
        entry = editable.model(input_ids=whole.ids, output_hidden_states=True).hidden_states[0]
        final = editable.final(entry, first=0, masks=masks, position_ids=whole.positions)
    assert whole.differ(editable.logits(final), whole.logits) < case(family).tolerance


def _state_of_modules(model: PreTrainedModel) -> dict[str, tuple[Any, ...]]:
    """What a partial execution could leave changed in each module."""
    return {
        name: (
            module.__dict__.get("forward"),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3"])
def test_modules_are_as_before_even_after_an_error(family: str) -> None:
    tiny = fresh(family)
    whole = Whole(tiny.model)
    before = _state_of_modules(tiny.model)
    assert not any(forward for forward, *_ in before.values())
    masks = tiny.editable.masks(whole.positions, whole.segments)
    hidden = torch.zeros(len(LENGTHS), WIDTH, 32, dtype=torch.float64)
    common: dict[str, Any] = {"masks": masks, "position_ids": whole.positions}
    with torch.no_grad():
        tiny.editable.run(hidden, first=0, stop=2, **common)
        tiny.editable.final(hidden, first=4, **common)
    assert _state_of_modules(tiny.model) == before
    for first in (0, 2):  # both ways of entering
        with pytest.raises(RuntimeError):
            tiny.editable.run(hidden[..., :-1], first=first, stop=3, **common)
        with pytest.raises(RuntimeError):
            tiny.editable.final(hidden[..., :-1], first=first, **common)
        assert _state_of_modules(tiny.model) == before
    again = Whole(tiny.model)
    assert all(map(torch.equal, whole.logits, again.logits))


def test_a_forward_that_was_wrapped_before_stays_wrapped() -> None:
    tiny = fresh("llama")
    block = tiny.blocks[3]
    original = block.forward
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = counted  # type: ignore[method-assign]
    whole = Whole(tiny.model)
    counted_before = len(calls)
    masks = tiny.editable.masks(whole.positions, whole.segments)
    with torch.no_grad():
        tiny.editable.run(
            None,
            first=0,
            stop=2,
            masks=masks,
            position_ids=whole.positions,
            input_ids=whole.ids,
        )
    assert len(calls) == counted_before  # the block above the range did not compute
    assert block.__dict__["forward"] is counted


def test_the_model_is_frozen_and_in_evaluation_mode() -> None:
    tiny = fresh("gpt2")
    tiny.model.train().requires_grad_(True)
    editable = EditableModel(tiny.model)
    assert not editable.model.training
    assert not any(parameter.requires_grad for parameter in editable.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_logits_are_wide_and_soft_capped(family: str, dtype: torch.dtype) -> None:
    editable = fresh(family, dtype).editable
    final = torch.linspace(-9, 9, 32, dtype=dtype)[None]
    with torch.no_grad():
        logits = editable.logits(final)
        plain = editable.unembedding(final).float()
    assert logits.dtype == torch.float32
    if family == "gemma2":
        assert logits.abs().max() <= 5.0
        assert torch.allclose(logits, 5 * torch.tanh(plain / 5))
    else:
        assert torch.equal(logits, plain)


def test_a_device_comes_with_its_reason() -> None:
    assert resolve_device("cpu") == (torch.device("cpu"), "set by the caller")
    device, reason = resolve_device()
    assert (device.type == "cuda") == torch.cuda.is_available()
    assert "CUDA" in reason
