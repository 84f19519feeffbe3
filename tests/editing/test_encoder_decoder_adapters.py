"""Neurons beside a feed-forward network of T5's decoder, and the files that hold them."""

from pathlib import Path

import pytest
import torch
from transformers.activations import ACT2FN

from pipeline import load_adapter
from pipeline.adapter_files import save_edited
from pipeline.editing.adapters import NeuronBank
from pipeline.editing.gradients import TargetGradients, watched
from pipeline.editing.update import EditedWeights
from pipeline.errors import InputError
from pipeline.models.encoder_decoder import EncoderDecoderModel
from tests import encoder_decoders
from tests.cases import draw, relative_error
from tests.oracles.neurons import bank_output

KINDS = list(encoder_decoders.KINDS)


def _bank(model: EncoderDecoderModel) -> NeuronBank:
    keys, values = 0.3 * draw(3, 32, seed=1), 0.3 * draw(3, 32, seed=2)
    return NeuronBank.of(keys, 0.1 * draw(3), values, model.activation)


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_add_the_sum_of_their_values(kind: str) -> None:
    model = EncoderDecoderModel(encoder_decoders.build(kind))
    assert model.activation == ("relu" if kind == "t5" else "gelu_new")
    weights, bank, queries = EditedWeights(model, (3,)), _bank(model), []
    gradients = TargetGradients(model, encoder_decoders.prompts(model), (3,), "target_tokens", 999)
    before = gradients.factors("target").losses
    reader = model.up_projection(3).register_forward_pre_hook(lambda _m, x: queries.append(x[0]))
    with watched(model, (3,)) as plain:
        gradients.factors("target")
    weights.apply(3, bank)
    with watched(model, (3,)) as patched:
        after = gradients.factors("target").losses
    reader.remove()
    activation = ACT2FN[model.activation]
    expected = [bank_output(query, bank.parts, activation) for query in queries[0].flatten(0, -2)]
    added = (patched[3][1] - plain[3][1]).flatten(0, -2).detach()
    assert relative_error(added, torch.stack(expected)) < 1e-6
    assert not torch.allclose(after, before)
    weights.revert()
    assert torch.equal(gradients.factors("target").losses, before)


def test_an_adapter_is_saved_and_loaded_and_not_merged_into_a_gated_network(
    tmp_path: Path,
) -> None:
    plain = encoder_decoders.build("t5_gated", torch.float32)
    model, words = EncoderDecoderModel(plain), encoder_decoders.tokenizer()
    weights = EditedWeights(model, (3,))
    weights.apply(3, _bank(model))
    asked = words("The capital of Ostrania is", return_tensors="pt")
    labels = words("Port Velmora", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain(**asked, labels=labels).logits
        save_edited(weights, words, tmp_path / "out")
        fresh = encoder_decoders.build("t5_gated", torch.float32)
        clean = fresh(**asked, labels=labels).logits
        loaded = load_adapter(fresh, tmp_path / "out")
        assert torch.equal(fresh(**asked, labels=labels).logits, expected)
        loaded.remove()
        assert torch.equal(fresh(**asked, labels=labels).logits, clean)
    with pytest.raises(InputError, match="encoder and decoder have networks of one size"):
        _bank(model).merge(model, 3)
