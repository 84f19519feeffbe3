"""Gradients as factors against the weights' own, which whole plain passes leave."""

from typing import get_args

import pytest
import torch

from pipeline.editing.gradients import TargetGradients
from pipeline.editing.targets import Read
from pipeline.editing.update import EditedWeights
from tests.cases import ALL_FAMILIES, CONTEXTS, EDITS, Case, case, draw, fresh, relative_error
from tests.oracles import gradients as oracle


def _gradients(
    tiny: Case, layers: tuple[int, ...], read: Read, max_tokens: int = 512, keeps: bool = True
) -> TargetGradients:
    prompts = tiny.prompts(EDITS, CONTEXTS)
    return TargetGradients(tiny.editable, prompts, layers, read, max_tokens, keeps)


def _assert_as_plain(tiny: Case, layers: tuple[int, ...], read: Read, max_tokens: int) -> None:
    found = _gradients(tiny, layers, read, max_tokens).factors("all")
    downs = [tiny.down_projections[layer] for layer in layers]
    losses, expected = oracle.gradients(
        tiny.model, tiny.tokenizer, downs, EDITS, CONTEXTS,
        last_prompt_token=read == "last_prompt_token",
    )  # fmt: skip
    assert torch.allclose(
        found.losses, torch.tensor(losses).double(), rtol=max(tiny.tolerance, 1e-6)
    )
    for layer, gradient in zip(layers, expected, strict=True):
        assert relative_error(found.matrix(layer), gradient) < tiny.tolerance


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_factors_multiply_to_the_weights_own_gradients(family: str) -> None:
    _assert_as_plain(case(family), (1, 3), "target_tokens", 512)


@pytest.mark.parametrize("layers", [(0,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("read", ["target_tokens", "last_prompt_token"])
@pytest.mark.parametrize("max_tokens", [1, 60])
def test_any_layers_read_and_batches(layers: tuple[int, ...], read: Read, max_tokens: int) -> None:
    _assert_as_plain(case("gptj"), layers, read, max_tokens)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_is_that_of_a_batch_padded_on_the_left(family: str) -> None:
    """The core pads on the right, with positions of its own; an edited model in plain transformers
    has the same losses of prompts of unequal length with the padding before them."""
    tiny = fresh(family)
    EditedWeights(tiny.editable, (1,)).apply(1, 0.1 * draw(32, 64))
    prompts = tiny.prompts(EDITS, ["{}"])
    found = TargetGradients(tiny.editable, prompts, (1,), "target_tokens", 512).factors("all")
    texts = [[*prompt.rewrites[0].ids, *prompt.target] for prompt in prompts]
    width = max(map(len, texts))
    assert min(map(len, texts)) < width - 3
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = tiny.model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    likely = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    losses = [
        float(-row[-len(prompt.target) :].mean())
        for row, prompt in zip(likely, prompts, strict=True)
    ]
    assert found.losses.tolist() == pytest.approx(losses, abs=1e-5)


def test_a_target_of_one_token_is_read_alike_and_of_two_not() -> None:
    tiny = case("gpt2")
    prompts = tiny.prompts([*EDITS, EDITS[0]._replace(target_new="in")], CONTEXTS)
    behind, at_prompt = (
        TargetGradients(tiny.editable, prompts, (2,), read, 512).factors("all").losses
        for read in get_args(Read)
    )
    single = [len(prompt.target) == 1 for prompt in prompts]
    assert any(single) != all(single)
    assert torch.isclose(behind, at_prompt, rtol=1e-9).tolist() == single


def test_target_factors_are_those_of_the_tokens_that_predict_one() -> None:
    tiny = case("llama")
    gradients = _gradients(tiny, (1, 3), "target_tokens")
    every, chosen = gradients.factors("all"), gradients.factors("target")
    count = sum(len(p.target) * len(p.rewrites) for p in tiny.prompts(EDITS, CONTEXTS))
    assert len(chosen.keys[1]) == len(chosen.gradients[1]) == count < len(every.keys[1])
    # In the last block nothing but these tokens has a gradient.
    assert len(chosen.keys[3]) == count
    assert relative_error(chosen.matrix(3), every.matrix(3)) < 1e-12


def test_what_enters_is_kept_and_the_edited_layers_see_new_weights() -> None:
    tiny = fresh("gpt_neox")
    weights = EditedWeights(tiny.editable, (1, 2))
    kept, anew = (_gradients(tiny, (1, 2), "target_tokens", keeps=keeps) for keeps in (True, False))
    before = kept.factors("all").losses
    assert kept.num_bytes > 0 == anew.num_bytes
    change = {2: 0.1 * draw(32, 64)}
    pristine = tiny.editable.oriented_weight(2).clone()
    with weights.tried(change):
        found = kept.factors("all").losses
        assert torch.equal(found, anew.factors("all").losses)
    assert not torch.allclose(found, before)
    assert torch.equal(tiny.editable.oriented_weight(2), pristine) and weights.version == 0
    assert torch.equal(kept.factors("all").losses, before)


def test_a_change_that_is_tried_comes_on_top_of_what_was_applied() -> None:
    tiny = fresh("gpt2", torch.float32)
    weights = EditedWeights(tiny.editable, (1,))
    first, second = (0.1 * draw(32, 64, seed=seed).float() for seed in (1, 2))
    weights.apply(1, first)
    applied = tiny.editable.oriented_weight(1).clone()
    with weights.tried({1: second}):
        tried = tiny.editable.oriented_weight(1).clone()
    assert torch.equal(tiny.editable.oriented_weight(1), applied)
    weights.apply(1, second)
    assert torch.equal(tiny.editable.oriented_weight(1), tried)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gpt_neox"])
@pytest.mark.parametrize(("layers", "max_tokens"), [((1, 3), 512), ((0, 2), 40)])
def test_edits_with_weights_of_their_own_are_as_if_each_were_tried_alone(
    family: str, layers: tuple[int, ...], max_tokens: int
) -> None:
    tiny = case(family)
    weights, prompts = EditedWeights(tiny.editable, layers), tiny.prompts(EDITS[:4], CONTEXTS)
    shapes = {layer: tiny.editable.oriented_weight(layer).shape for layer in layers}
    changes = [
        {k: 0.1 * draw(*shape, seed=seed) for k, shape in shapes.items()} for seed in range(2)
    ]
    own = {layer: weights.apart(layer, [change[layer] for change in changes]) for layer in layers}
    gradients = TargetGradients(tiny.editable, prompts, layers, "target_tokens", max_tokens)
    with gradients.weights_apart(own, 2):
        found = gradients.factors_apart("all", 2)
        read = gradients.read(lambda batch, states: batch.losses(tiny.editable, states)[:, None])
    assert torch.allclose(read[:, 0], torch.cat([part.losses for part in found]), rtol=1e-5)
    for start, change, part in zip((0, 2), changes, found, strict=True):
        alone = TargetGradients(
            tiny.editable, prompts[start : start + 2], layers, "target_tokens", max_tokens
        )
        with weights.tried(change):
            expected = alone.factors("all")
        assert torch.allclose(part.losses, expected.losses, rtol=max(tiny.tolerance, 1e-5))
        for layer in layers:
            assert relative_error(part.matrix(layer), expected.matrix(layer)) < tiny.tolerance
    before = gradients.factors("all").losses
    assert not torch.allclose(before, read[:, 0], rtol=1e-3)
