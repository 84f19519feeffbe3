"""Gradients in a T5 decoder as factors, against those of transformers' own loss."""

from typing import Any

import pytest
import torch

from pipeline.editing.gradients import TargetGradients, watched
from pipeline.editing.targets import Read, target_rows
from pipeline.editing.update import EditedWeights
from pipeline.errors import InputError
from pipeline.models.encoder_decoder import EncoderDecoderModel
from pipeline.prompts import encode_targets
from tests import encoder_decoders
from tests.cases import CONTEXTS, EDITS, draw, relative_error
from tests.oracles import encoder_decoder as oracle

KINDS = list(encoder_decoders.KINDS)


def _gradients(
    model: EncoderDecoderModel, layers: tuple[int, ...], read: Read, size: int = 512, **given: Any
) -> TargetGradients:
    prompts = encoder_decoders.prompts(model, EDITS, CONTEXTS)
    return TargetGradients(model, prompts, layers, read, size, **given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "read", "size"),
    [
        ((1, 3), "target_tokens", 512),
        ((0,), "target_tokens", 60),
        ((3,), "last_prompt_token", 1),
        ((0, 1, 2, 3), "last_prompt_token", 512),
    ],
)
def test_factors_multiply_to_the_weights_own_gradients(
    kind: str, layers: tuple[int, ...], read: Read, size: int
) -> None:
    model = encoder_decoders.case(kind)
    found = _gradients(model, layers, read, size).factors("all")
    downs = [encoder_decoders.down_projections(model.model)[layer] for layer in layers]
    losses, expected = oracle.gradients(
        model.model, encoder_decoders.tokenizer(), downs, EDITS, CONTEXTS,
        at_start=read == "last_prompt_token",
    )  # fmt: skip
    assert torch.allclose(found.losses, torch.tensor(losses).double(), rtol=1e-6)
    for layer, gradient in zip(layers, expected, strict=True):
        assert relative_error(found.matrix(layer), gradient) < 1e-9


def test_target_factors_are_those_of_the_answers_tokens() -> None:
    """In an encoder-decoder model these are all of the decoder's tokens, the end's among them."""
    model = encoder_decoders.case("t5")
    gradients = _gradients(model, (1, 3), "target_tokens")
    every, chosen = gradients.factors("all"), gradients.factors("target")
    prompts = encoder_decoders.prompts(model, EDITS, CONTEXTS)
    count = sum(len(p.target) * len(p.rewrites) for p in prompts)
    assert len(every.keys[1]) == len(chosen.keys[1]) == count
    row = target_rows(prompts[:1], "target_tokens")[0]
    assert row.ids == (0, *prompts[0].target[:-1]) and row.source == prompts[0].rewrites[0].ids
    with watched(model, (2,)) as seen, torch.no_grad():
        model.model(input_ids=torch.tensor([row.source]), labels=torch.tensor([row.labels]))
    alone = TargetGradients(
        model, encoder_decoders.prompts(model, EDITS[:1]), (2,), "target_tokens", 99
    )
    assert relative_error(alone.factors("target").keys[2], seen[2][0][0]) < 1e-12


def test_what_the_encoder_puts_out_is_kept() -> None:
    model = EncoderDecoderModel(encoder_decoders.build("t5_gated"))
    weights, calls = EditedWeights(model, (1, 2)), []
    handle = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    kept = _gradients(model, (1, 2), "target_tokens", 80)
    before = kept.factors("all").losses
    batches = len(calls)
    with weights.tried({2: 0.1 * draw(32, 64)}):
        changed = kept.factors("all").losses
    assert batches > 1 and len(calls) == batches
    anew = _gradients(model, (1, 2), "target_tokens", 80, keeps=False)
    with weights.tried({2: 0.1 * draw(32, 64)}):
        assert torch.equal(anew.factors("all").losses, changed)
    assert len(calls) == 2 * batches and not torch.allclose(before, changed)
    handle.remove()
    prompts = encoder_decoders.prompts(model, EDITS, CONTEXTS)
    read = sum(len(row.ids) for prompt in prompts for row in prompt.rewrites)
    assert kept.num_bytes > 8 * 32 * read and anew.num_bytes == 0


def test_answers_end_and_are_texts_of_their_own() -> None:
    model, tokenizer = encoder_decoders.case("t5"), encoder_decoders.tokenizer()
    [plain, spaced] = encode_targets(tokenizer, ["English", " English "], model.answers)
    assert list(plain) == tokenizer("English")["input_ids"] == list(spaced)
    assert plain[-1] == tokenizer.eos_token_id and plain.count(plain[-1]) == 1
    with pytest.raises(InputError, match="target '' has no token"):
        encode_targets(tokenizer, [""], model.answers)
