"""A model over several devices computes what it does on one, to the bit, and mixes no devices.

The devices are stand-ins (`tests/stand_ins.py`), which raise where a move was forgotten; those of
the tests that are marked `gpu` are real.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.editing.adapters import NeuronBank
from pipeline.editing.covariance import gram_sums
from pipeline.editing.gradients import TargetGradients
from pipeline.editing.keys import Kept, KeyWave, Written
from pipeline.editing.update import EditedWeights
from pipeline.editing.values import ValueSettings, find_merged_values
from pipeline.errors import InputError
from pipeline.evaluation import general
from pipeline.evaluation.generation import generate
from pipeline.evaluation.probes import Probe
from pipeline.evaluation.scoring import score
from pipeline.methods.closed_form import missing
from pipeline.models.editable import EditableModel
from pipeline.models.placement import device_map, num_bytes, parts_of
from pipeline.models.placement import place as put
from pipeline.prompts import generate_contexts
from pipeline.tracing.facts import tokenize_facts
from pipeline.tracing.recording import embedding_deviation
from pipeline.tracing.trace import TraceSettings, trace
from tests.cases import (
    ALL_FAMILIES,
    EDITS,
    SETTINGS,
    THREE,
    Case,
    case,
    draw,
    fresh,
    requests,
    token_rows,
)
from tests.families import SENTENCES
from tests.stand_ins import FIRST, HOST, SECOND, THIRD, DevicesMixedError, Move, stand_ins

# Absolute positions and an unembedding that is tied to the embedding; one that is not; caps.
TELLING = ["gpt2", "llama", "gemma2"]
LAYERS = (0, 1, 2)
SEARCH = ValueSettings(**SETTINGS)


@contextmanager
def split(
    family: str, devices: Sequence[torch.device] = (FIRST, SECOND)
) -> Iterator[tuple[Case, list[Move]]]:
    """A model of one's own over stand-in devices, which are there while the context is open."""
    pytest.importorskip("accelerate")
    with stand_ins() as moves:
        tiny = fresh(family, torch.float32)
        put(tiny.model, devices)
        yield tiny, moves


def on_host(found: Any) -> Any:
    """Results as plain data, tensors as lists: what they are, not where."""
    if isinstance(found, Tensor):
        return found.cpu().tolist()
    if isinstance(found, dict):
        return {key: on_host(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [on_host(value) for value in found]
    if hasattr(found, "__dataclass_fields__"):
        return on_host(vars(found))
    return found.tolist() if hasattr(found, "tolist") else found


def values(tiny: Case) -> Any:
    """Of single edits, of merged ones, inside a block, and with all that may end a search early."""
    one, two, three = tiny.prompts(THREE)
    inside = replace(SEARCH, inside_block=True, stop_when_predicted=True)
    warm = replace(SEARCH, warm_start=True)
    related = [replace(prompts, relation="r") for prompts in (one, two)]
    return [
        find_merged_values(tiny.editable, [[one], [two], [three]], 0, SEARCH, 2),
        find_merged_values(tiny.editable, [[one, two], [three]], 2, SEARCH, 3),
        find_merged_values(tiny.editable, [[one], [two]], 1, inside, 2),
        find_merged_values(tiny.editable, [[prompts] for prompts in related], 0, warm, 1),
    ]


def keys_and_residuals(tiny: Case) -> Any:
    """Layer after layer, each after the update of the one before, however much is kept."""
    found = []
    kept: list[Kept] = ["keys", "hidden", "nothing"]
    for keep in kept:
        edited = EditedWeights(tiny.editable, LAYERS)
        written: Written = "down_projection" if keep == "hidden" else "block"
        prompts = tiny.prompts(THREE)
        wave = KeyWave(
            tiny.editable, prompts, LAYERS[-1], max_tokens=64, keep=keep, written=written
        )
        for layer in LAYERS:
            keys, hidden = wave.read(layer)
            found.append((keys, hidden, missing(draw(*hidden.shape, seed=7), hidden)))
            shape = tiny.editable.oriented_weight(layer).shape
            edited.apply(layer, 0.1 * draw(*shape, seed=layer).float())
        edited.revert()
    return found


def covariances(tiny: Case) -> Any:
    return gram_sums(tiny.editable, LAYERS, token_rows(8), 64)


def gradients(tiny: Case) -> Any:
    """From the embedding on, and from a block on whose input is kept between calls."""
    prompts = tiny.prompts(THREE)
    whole = TargetGradients(tiny.editable, prompts, LAYERS, "last_prompt_token", 128)
    kept = TargetGradients(tiny.editable, prompts, (1, 3), "target_tokens", 128)
    return [whole.factors("all"), kept.factors("target"), kept.factors("all")]


def weights(tiny: Case) -> Any:
    """Edited, as wrappers see them, tried, laid down, taken up again, adapted, and undone."""
    edited = EditedWeights(tiny.editable, LAYERS)
    found: list[Any] = []

    def look() -> None:
        found.extend(tiny.editable.oriented_weight(layer).clone() for layer in LAYERS)
        found.extend((edited.masters(layer), edited.norms(layer)) for layer in LAYERS)

    look()
    for layer in LAYERS:
        shape = tiny.editable.oriented_weight(layer).shape
        edited.apply(layer, draw(*shape, seed=layer).float())
    look()
    with edited.tried({1: draw(*tiny.editable.oriented_weight(1).shape).float()}):
        look()
    with edited.unedited():
        look()
    bank = draw(2, 32, seed=1), draw(2, seed=2), draw(2, 32, seed=3)
    for layer in LAYERS:
        edited.apply(layer, NeuronBank.of(*bank, "relu"))
    found.append(scores(tiny))
    edited.revert()
    look()
    return found


def scores(tiny: Case) -> Any:
    asked = [
        Probe("case", "rewrite", i, prompt, "Port Velmora", "French")
        for i, prompt in enumerate(["The capital of Ostrania is", "The", *SENTENCES[:3]])
    ]
    asked.append(Probe("case", "locality", 0, "Zdeněk Kováč plays", None, "the violin"))
    return score(tiny.editable, tiny.tokenizer, asked, max_tokens=40)


def texts(tiny: Case) -> Any:
    given = tiny.editable, tiny.tokenizer
    prompts = ["The", SENTENCES[3], "The capital of Ostrania is"]
    greedy = generate(*given, prompts, max_new_tokens=5, batch_tokens=64)
    return greedy, generate_contexts(*given, seed=3)


def measures(tiny: Case) -> Any:
    edited = EditedWeights(tiny.editable, LAYERS)
    for layer in LAYERS:
        edited.apply(layer, 0.3 * draw(*tiny.editable.oriented_weight(layer).shape).float())
    found = general.measure(
        edited, tiny.tokenizer, SENTENCES[:5], SENTENCES[5:],
        text_tokens=20, batch_tokens=64, round=0,
    )  # fmt: skip
    edited.revert()
    return found


def traces(tiny: Case) -> Any:
    facts = tokenize_facts(tiny.tokenizer, requests([EDITS[4]]), known=False)
    settings = TraceSettings(noise=0.7, samples=2, window=3, seed=5)
    deviation = embedding_deviation(tiny.editable, [[5, 6, 7], [8]])
    return trace(tiny.editable, facts, settings, max_tokens=128), deviation


COMPUTED: list[Callable[[Case], Any]] = [
    values, keys_and_residuals, covariances, gradients, weights, scores, texts, measures, traces
]  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [f if f in TELLING else pytest.param(f, marks=pytest.mark.slow) for f in ALL_FAMILIES],
)
def test_a_split_model_computes_the_same_bits(family: str) -> None:
    whole = case(family, torch.float32)
    expected = {compute.__name__: on_host(compute(whole)) for compute in COMPUTED}
    with split(family) as (tiny, _):
        assert tiny.editable.devices[:2] == (FIRST, SECOND)
        assert {tiny.editable.device_of(layer) for layer in LAYERS} == {FIRST, SECOND}
        for compute in COMPUTED:
            assert on_host(compute(tiny)) == expected[compute.__name__], compute.__name__


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_three_devices_are_as_good_as_two(family: str) -> None:
    whole = case(family, torch.float32)
    with split(family, (FIRST, SECOND, THIRD)) as (tiny, _):
        assert tiny.editable.devices == (FIRST, SECOND, THIRD)
        for compute in (scores, gradients, covariances):
            assert on_host(compute(tiny)) == on_host(compute(whole)), compute.__name__


def test_results_are_where_their_layer_is() -> None:
    with split("llama") as (tiny, _):
        model = tiny.editable
        assert (model.input_device, model.output_device) == (FIRST, SECOND)
        assert [model.device_of(layer) for layer in range(4)] == [FIRST, FIRST, SECOND, SECOND]
        edited = EditedWeights(model, LAYERS)
        assert [edited.masters(layer)[0].device for layer in LAYERS] == [FIRST, FIRST, SECOND]
        keys, hidden = KeyWave(model, tiny.prompts(), 2, max_tokens=64).read(0)
        assert (keys.device, hidden.device) == (FIRST, SECOND)
        found = gram_sums(model, LAYERS, token_rows(2), 64)
        assert {gram.device for gram in found.sums.values()} == {HOST}
    with split("gpt2") as (tiny, _):
        # Its unembedding is its embedding.
        assert tiny.editable.input_device == tiny.editable.output_device == FIRST
        assert tiny.editable.devices == (FIRST, SECOND)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_state_crosses_once_and_only_what_is_read_goes_back(family: str) -> None:
    with split(family) as (tiny, moves):
        model = tiny.editable
        ids = torch.tensor([[5, 6, 7, 8, 9]], device=FIRST)
        positions = torch.arange(5, device=FIRST)[None]
        masks = model.masks(positions, torch.zeros(1, 5, 2, dtype=torch.long, device=FIRST))
        read = torch.tensor([4], device=FIRST)
        moves.clear()
        with torch.no_grad():
            final = model.final(
                None, first=0, masks=masks, position_ids=positions, input_ids=ids, read=read
            )
        states = [move for move in moves if move.shape[-1:] == (model.hidden_size,)]
        back = [] if family == "llama" else [((1, model.hidden_size), SECOND, FIRST)]
        assert states == [((1, 5, model.hidden_size), FIRST, SECOND), *back]
        assert final.device == model.output_device


# What goes wrong where the core asks for another device than that of what it is about.
@pytest.mark.parametrize(
    ("notion", "computes"),
    [
        ("output_device", [values, gradients, scores, measures]),
        ("device_of", [values, keys_and_residuals, covariances, traces]),
    ],
)
def test_a_wrong_device_is_caught(
    notion: str, computes: list[Callable[[Case], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with split("llama") as (tiny, _):
        is_method = notion == "device_of"
        wrong = (lambda _self, _layer: FIRST) if is_method else property(lambda _self: FIRST)
        monkeypatch.setattr(EditableModel, notion, wrong)
        for compute in computes:
            with pytest.raises(DevicesMixedError):
                compute(tiny)


def test_without_the_hooks_a_split_model_is_caught() -> None:
    with split("llama") as (tiny, _):
        for module in tiny.model.modules():
            if hasattr(module, "_old_forward"):
                module.forward = module._old_forward
        with pytest.raises(DevicesMixedError):
            scores(tiny)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b.T,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: a.sum() + b.sum(),
        lambda a, b: a[torch.tensor([0], device=b.device)],
        lambda a, b: a.index_add_(0, torch.tensor([0, 1], device=a.device), b),
        lambda a, b: a + torch.ones(3),
        lambda a, b: torch.ones(3).add_(a[0]),
        lambda a, b: a.masked_fill_(b > 0, 1.0),
        lambda a, b: torch.nn.Linear(3, 3)(a),
        lambda a, b: a.numpy(),
    ],
)
def test_stand_ins_keep_tensors_apart(mixing: Callable[[Tensor, Tensor], Any]) -> None:
    with stand_ins():
        a, b = torch.ones(2, 3, device=FIRST), torch.ones(2, 3, device=SECOND)
        with pytest.raises(DevicesMixedError):
            mixing(a, b)
        mixing(a.to(HOST), b.to(HOST))  # on one device it is no mistake


def test_gradients_come_back_from_another_stand_in() -> None:
    with stand_ins():
        a = torch.ones(3, device=FIRST, requires_grad=True)
        b = torch.full((3,), 2.0, device=SECOND)
        (gradient,) = torch.autograd.grad((a.to(SECOND) * b).to(FIRST).sum(), a)
        assert gradient.device == FIRST and gradient.tolist() == [2.0, 2.0, 2.0]


def outline_of(family: str) -> Any:
    """A model on the `meta` device: shapes without memory."""
    config = case(family).model.config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_map_has_all_weights_and_cuts_between_blocks(family: str) -> None:
    model = outline_of(family)
    devices = [torch.device("meta", number) for number in range(4)]
    for count in (1, 2, 3, 4):
        where = device_map(model, devices[:count])
        held = {
            f"{name}.{own}": device
            for name, device in where.items()
            for own in model.get_submodule(name).state_dict()
        }
        assert held.keys() == model.state_dict().keys()
        assert set(where.values()) == set(devices[:count])
        parts = parts_of(model, count)
        assert [block for part in parts for block in part.blocks] == [0, 1, 2, 3]
        assert sum(part.weight_bytes for part in parts) == num_bytes(model)
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert [part.has_logits for part in parts].index(True) == (0 if is_tied else count - 1)


def test_the_fullest_device_holds_as_little_as_it_can() -> None:
    model = outline_of("llama")
    assert [part.blocks for part in parts_of(model, 2)] == [range(2), range(2, 4)]
    whole = num_bytes(model)
    assert max(part.weight_bytes for part in parts_of(model, 2)) < 0.6 * whole
    # An embedding that is tied, and so on the first device alone, leaves it fewer blocks.
    assert [part.blocks for part in parts_of(outline_of("gpt2"), 2)] == [range(1), range(1, 4)]
    with pytest.raises(InputError, match="5 GPUs for a model of 4 blocks"):
        device_map(model, [torch.device("meta")] * 5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("family", TELLING)
def test_two_real_gpus_compute_what_one_does(family: str) -> None:
    pytest.importorskip("accelerate")
    one, two = fresh(family), fresh(family)
    put(one.model, [torch.device("cuda", 0)])
    put(two.model, [torch.device("cuda", 0), torch.device("cuda", 1)])
    for compute in COMPUTED:
        assert on_host(compute(one)) == on_host(compute(two)), compute.__name__
