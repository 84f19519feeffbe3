"""T5's decoder as a stack of blocks: what the whole model gives, wherever it is entered."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.editing.batching import TokenBatch, make_batch
from pipeline.errors import InputError, ModelNotSupportedError
from pipeline.models.editable import EditableModel
from pipeline.models.encoder_decoder import EncoderDecoderModel, editable_model
from pipeline.models.kernels import choose_kernels
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.placement import place
from pipeline.spec import ModelSpec
from tests import encoder_decoders, families
from tests.cases import draw, relative_error

KINDS = list(encoder_decoders.KINDS)
ROWS = [[0, 9, 31, 7, 55, 12, 80, 3, 41], [0, 17], [0, 23, 99, 5]]
SOURCES = [[40, 2, 8, 1], [11, 45, 67, 30, 9, 22, 71, 14, 60, 33, 28, 54, 1], [70, 1]]


def _batch(model: EncoderDecoderModel) -> TokenBatch:
    return make_batch(model, ROWS, range(len(ROWS)), SOURCES)


def _plain(model: EncoderDecoderModel) -> list[Tensor]:
    """transformers' logits, one row at a time."""
    with torch.no_grad():
        return [
            model.model(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([row])
            ).logits[0]
            for row, source in zip(ROWS, SOURCES, strict=True)
        ]


def _assert_plain(model: EncoderDecoderModel, final: Tensor, tolerance: float = 1e-12) -> None:
    logits = model.logits(final)
    for found, expected in zip(logits, _plain(model), strict=True):
        assert relative_error(found[: len(expected)], expected) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_table_points_at_the_decoder(kind: str) -> None:
    model = encoder_decoders.case(kind)
    downs = encoder_decoders.down_projections(model.model)
    assert model.num_blocks == 4 and len(model.encoder.block) == 3
    assert (model.hidden_size, model.key_size(2), model.max_positions) == (32, 64, None)
    for layer, down in enumerate(downs):
        assert model.down_projection(layer) is down
        assert down in list(model.mlp(layer).modules())
        stored = model.model.state_dict()[model.weight_name(layer)]
        assert stored.data_ptr() == model.oriented_weight(layer).data_ptr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", range(5))
@torch.no_grad()
def test_entered_anywhere_it_is_the_whole_model(kind: str, first: int) -> None:
    model = encoder_decoders.case(kind)
    batch = _batch(model)
    given = {"masks": batch.masks, "position_ids": batch.positions}
    entry = None
    if first:
        entry = model.run(None, first=0, stop=first, input_ids=batch.ids, **given)
    ids = batch.ids if entry is None else None
    final = model.final(entry, first=first, input_ids=ids, **given)
    _assert_plain(model, final)
    read = torch.tensor([0, 8, 10, 18, 21])
    some = model.final(entry, first=first, input_ids=ids, read=read, **given)
    assert relative_error(some, final.flatten(0, 1)[read]) < 1e-12
    for stop in range(max(first, 1), 4):
        middle = model.run(entry, first=first, stop=stop, input_ids=ids, **given)
        assert relative_error(model.final(middle, first=stop, **given), final) < 1e-12


@torch.no_grad()
def test_biases_of_positions_reach_blocks_that_are_entered() -> None:
    """Positions shape the output of blocks above the one that owns the biases."""
    model, twin = (EncoderDecoderModel(encoder_decoders.build("t5")) for _ in range(2))
    twin.attention(0).relative_attention_bias.weight.zero_()
    hidden = draw(len(ROWS), len(ROWS[0]), 32)
    found = []
    for one in (model, twin):
        batch = _batch(one)
        found.append(
            one.run(hidden, first=2, stop=3, masks=batch.masks, position_ids=batch.positions)
        )
    assert relative_error(*found) > 0.01


@torch.no_grad()
def test_the_encoder_runs_once_for_masks_that_are_ready() -> None:
    model = encoder_decoders.case("t5_gated")
    batch, calls = _batch(model), []
    handle = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    masks = model.ready(batch.masks)
    for _ in range(3):
        final = model.final(
            None, first=0, masks=masks, position_ids=batch.positions, input_ids=batch.ids
        )
    assert model.ready(masks) is masks
    handle.remove()
    assert len(calls) == 1
    assert masks.states.numel() * masks.states.itemsize == model.ready_bytes(batch.masks)
    _assert_plain(model, final)


def test_the_wrong_view_and_rows_without_prompts_are_refused() -> None:
    model = encoder_decoders.case("t5")
    with pytest.raises(ModelNotSupportedError, match="EditableModel is no view of model type 't5'"):
        EditableModel(model.model)
    with pytest.raises(ModelNotSupportedError, match="no view of model type 'gpt2'"):
        EncoderDecoderModel(families.build("gpt2"))
    assert type(editable_model(model.model)) is EncoderDecoderModel
    assert type(editable_model(families.build("gpt2"))) is EditableModel
    with pytest.raises(ValueError, match="need the prompts that they answer"):
        make_batch(model, ROWS, range(3))
    unnamed = encoder_decoders.build("t5")
    unnamed.config.decoder_start_token_id = None
    with pytest.raises(InputError, match=r"config.json has no decoder_start_token_id"):
        editable_model(unnamed)


@pytest.mark.parametrize("kind", KINDS)
def test_loads_as_it_was_saved(kind: str, tmp_path: Path) -> None:
    """Tied and scaled, or with an unembedding of its own; also after a second round trip."""
    encoder_decoders.save(kind, tmp_path / "once")
    written = load_model(ModelSpec(path=str(tmp_path / "once")), torch.device("cpu"))
    written.save_pretrained(tmp_path / "twice")
    expected = _plain(encoder_decoders.case(kind, torch.float32))
    for name in ("once", "twice"):
        loaded = load_model(ModelSpec(path=str(tmp_path / name)), torch.device("cpu"))
        model = editable_model(loaded)
        assert isinstance(model, EncoderDecoderModel)
        for found, wanted in zip(_plain(model), expected, strict=True):
            assert torch.equal(found, wanted)
        choose_kernels(loaded)
        batch = _batch(model)
        with torch.no_grad():
            final = model.final(
                None, first=0, masks=batch.masks, position_ids=batch.positions, input_ids=batch.ids
            )
        _assert_plain(model, final, 1e-5)
    ids = load_tokenizer(ModelSpec(path=str(tmp_path / "once")))("The capital of")["input_ids"]
    assert ids == encoder_decoders.tokenizer()("The capital of")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    """In float16 transformers keeps the down-projections in float32."""
    encoder_decoders.save("t5_gated", tmp_path)
    loaded = load_model(ModelSpec(path=str(tmp_path), dtype=dtype), torch.device("cpu"))
    model = EncoderDecoderModel(loaded)
    wide = dtype == "float16"
    assert (model.oriented_weight(1).dtype == torch.float32) == wide
    batch = _batch(model)
    given = {"masks": batch.masks, "position_ids": batch.positions}
    read = torch.tensor([0, 8, 10, 18, 21])
    entry = model.run(None, first=0, stop=2, input_ids=batch.ids, **given)
    logits = model.logits(model.final(entry, first=2, read=read, **given))
    assert logits.dtype == torch.float32

    def of_whole(one: EncoderDecoderModel) -> Tensor:
        plain = _plain(one)
        return torch.stack([plain[place // 9][place % 9] for place in read.tolist()]).double()

    expected = of_whole(encoder_decoders.case("t5_gated"))
    assert relative_error(logits, expected) < 1.5 * relative_error(of_whole(model), expected) < 0.2


def test_a_checkpoint_without_some_weights_is_refused(tmp_path: Path) -> None:
    encoder_decoders.save("t5", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["decoder.block.1.layer.1.EncDecAttention.k.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights, among them decoder\.block\.1"):
        load_model(ModelSpec(path=str(tmp_path)), torch.device("cpu"))


def test_it_is_not_spread_over_several_devices() -> None:
    with pytest.raises(InputError, match="not spread over several GPUs"):
        place(encoder_decoders.build("t5"), [torch.device("cpu")] * 2)
