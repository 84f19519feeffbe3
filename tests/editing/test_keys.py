"""Keys and hidden states of many edits at once against the plain ones."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.editing.keys import Kept, KeyWave, inputs_of
from pipeline.editing.update import EditedWeights
from tests.cases import ALL_FAMILIES, CONTEXTS, EDITS, Case, case, draw, fresh, relative_error
from tests.oracles.memit import block_output, compute_key, rewrite_rows

LAYERS = (0, 1, 2)


def _wave(
    tiny: Case, contexts: list[str] = CONTEXTS, max_tokens: int = 40, keep: Kept = "keys"
) -> KeyWave:
    prompts = tiny.prompts(EDITS, contexts)
    return KeyWave(tiny.editable, prompts, LAYERS[-1], max_tokens=max_tokens, keep=keep)


def _expected(
    tiny: Case, layer: int, contexts: list[str] = CONTEXTS, *, in_groups: bool = True
) -> tuple[Tensor, Tensor]:
    keys, hidden = [], []
    for edit in EDITS:
        down = tiny.down_projections[layer]
        own = (tiny.model, tiny.tokenizer, down, edit, contexts)
        keys.append(compute_key(*own, in_groups=in_groups))
        row = rewrite_rows(tiny.tokenizer, contexts, *edit)[0]
        hidden.append(block_output(tiny.model, tiny.blocks[LAYERS[-1]], row))
    return torch.stack(keys), torch.stack(hidden)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("in_groups", [True, False])
def test_keys_and_hidden_states_are_those_of_the_oracle(family: str, in_groups: bool) -> None:
    tiny = case(family)
    wave = _wave(tiny)
    for layer in LAYERS:
        keys, hidden = wave.read(layer, in_groups=in_groups)
        expected_keys, expected_hidden = _expected(tiny, layer, in_groups=in_groups)
        assert keys.shape == (len(EDITS), 64) and hidden.shape == (len(EDITS), 32)
        for ours, theirs in zip((*keys, *hidden), (*expected_keys, *expected_hidden), strict=True):
            assert relative_error(ours, theirs) < tiny.tolerance


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_context_is_enough(family: str) -> None:
    tiny = case(family)
    wave = _wave(tiny, ["{}"])
    for layer in LAYERS:
        for ours, theirs in zip(wave.read(layer), _expected(tiny, layer, ["{}"]), strict=True):
            assert relative_error(ours, theirs) < 1e-9


def _read_while_editing(tiny: Case, **options: int | Kept) -> list[Tensor]:
    """Keys and hidden states of a wave that passes weights as they are edited."""
    wave = _wave(tiny, **options)  # type: ignore[arg-type]
    weights = EditedWeights(tiny.editable, LAYERS)
    read: list[Tensor] = []
    for layer in LAYERS:
        read += wave.read(layer)
        weights.apply(layer, 0.3 * draw(32, 64, seed=layer))
    weights.revert()
    return read


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "opt", "mistral", "gemma3"])
def test_kept_hidden_states_change_no_bit(family: str, dtype: torch.dtype) -> None:
    tiny = fresh(family, dtype)
    kept = _read_while_editing(tiny)
    for less in ("hidden", "nothing"):
        assert all(map(torch.equal, kept, _read_while_editing(tiny, keep=less)))
    assert kept[0].dtype == dtype


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_layer_can_be_read_again(family: str) -> None:
    """As when the reducer was lost before it had added the keys."""
    tiny = fresh(family, torch.float32)
    wave = _wave(tiny)
    weights = EditedWeights(tiny.editable, LAYERS)
    for layer in LAYERS:
        first = wave.read(layer)
        assert all(map(torch.equal, wave.read(layer), first))
        if layer > LAYERS[0]:
            assert all(map(torch.equal, _wave(tiny).read(layer), first))
        weights.apply(layer, 0.3 * draw(32, 64, seed=layer))
    again = _wave(tiny)
    last = again.read(LAYERS[2])
    assert all(map(torch.equal, wave.read(LAYERS[1]), again.read(LAYERS[1])))
    assert all(map(torch.equal, wave.read(LAYERS[2]), last))
    weights.revert()


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
@pytest.mark.parametrize("keep", ["keys", "hidden", "nothing"])
def test_the_wave_sees_the_weights_as_they_are(family: str, keep: Kept) -> None:
    tiny = fresh(family)
    wave = _wave(tiny, keep=keep)
    weights = EditedWeights(tiny.editable, LAYERS)
    unedited = _expected(tiny, 2)[0]
    for layer in LAYERS:
        expected = _expected(tiny, layer)
        for ours, theirs in zip(wave.read(layer), expected, strict=True):
            assert relative_error(ours, theirs) < 1e-9
        weights.apply(layer, 0.3 * draw(32, 64, seed=layer))
    assert relative_error(expected[0], unedited) > 0.01


@pytest.mark.parametrize("max_tokens", [1, 17, 100, 100_000])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "opt"])
def test_batching_changes_nothing(family: str, max_tokens: int) -> None:
    tiny = fresh(family)
    expected = _read_while_editing(tiny, max_tokens=40)
    for ours, theirs in zip(
        _read_while_editing(tiny, max_tokens=max_tokens), expected, strict=True
    ):
        assert relative_error(ours, theirs) < 1e-10


def test_tokens_behind_the_subject_do_not_matter() -> None:
    tiny = case("llama")
    longer = [edit._replace(prompt=edit.prompt + " that and the other") for edit in EDITS]
    short = KeyWave(tiny.editable, tiny.prompts(EDITS), 2, max_tokens=40).read(1)
    long = KeyWave(tiny.editable, tiny.prompts(longer), 2, max_tokens=40).read(1)
    assert all(map(torch.equal, short, long))


def test_kept_bytes_are_counted() -> None:
    tiny = case("gpt2")
    tokens = sum(row.lookup + 1 for edit in tiny.prompts() for row in edit.rewrites)
    unpadded = _wave(tiny, max_tokens=1)  # every row is a batch of its own
    assert unpadded.num_bytes == tokens * (2 * 32 + 64) * 8
    unpadded.read(1)
    assert unpadded.num_bytes == tokens * (2 * 32 + 64) * 8
    assert _wave(tiny, max_tokens=100_000).num_bytes > tokens * (2 * 32 + 64) * 8
    assert _wave(tiny, max_tokens=1, keep="hidden").num_bytes == tokens * 32 * 8
    assert _wave(tiny, keep="nothing").num_bytes == 0


@pytest.mark.parametrize("less", ["hidden", "nothing"])
def test_a_wave_under_way_can_keep_less(less: Kept) -> None:
    tiny = fresh("llama", torch.float32)
    waves = [_wave(tiny), _wave(tiny)]
    weights = EditedWeights(tiny.editable, LAYERS)
    for layer in LAYERS:
        assert all(map(torch.equal, waves[0].read(layer), waves[1].read(layer)))
        waves[1].keep_less(less)
        weights.apply(layer, 0.3 * draw(32, 64, seed=layer))
    weights.revert()


def test_inputs_are_collected_only_inside() -> None:
    module = nn.Linear(2, 3)
    first, second = torch.ones(1, 2), torch.zeros(1, 2)
    with inputs_of(module) as seen:
        module(first)
    module(second)
    assert len(seen) == 1 and seen[0] is first
    with pytest.raises(RuntimeError), inputs_of(module):
        module(torch.ones(1, 5))
    assert not module._forward_pre_hooks
