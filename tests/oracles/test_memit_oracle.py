"""The reference itself is checked: against identities and the public code's values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tests.families import FAMILIES, SENTENCES, build, build_tokenizer, modules, save
from tests.oracles.memit import (
    Edit,
    adder,
    apply_memit,
    block_output,
    compute_covariance,
    compute_key,
    compute_value,
    find_lookup,
    hooked,
    kl_row,
    module_input,
    rewrite_rows,
    solve_update,
    update_weights,
)

CONTEXTS = ["{}", "Therefore, the capital of. {}", "You can {find} it in. {}"]
EDITS = [
    Edit("The mother tongue of {} is", "Anselm Quillfeather", "English"),
    Edit("{} is in the country of", "The lighthouse of Port Velmora", "Italy"),
    Edit("The profession of {} is that of a", "Zdeněk Kováč", "lighthouse"),
]
SETTINGS: dict[str, Any] = {
    "steps": 8,
    "learning_rate": 0.5,
    "weight_decay": 0.1,
    "kl_weight": 0.0625,
    "clamp_norm": 2.0,
    "stop_loss": 0.05,
}
# Norms after the down-projection make a block's output non-linear in its weight.
LINEAR_FAMILIES = [family for family in FAMILIES if not family.startswith("gemma")]


def _token_lists() -> list[list[int]]:
    """Random text: enough of it that each inner unit of each family fires (OPT's are ReLUs)."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 30, (40,), generator=generator).tolist()
    return [torch.randint(3, 400, (length,), generator=generator).tolist() for length in lengths]


def _sentence_ids() -> Tensor:
    return build_tokenizer()(SENTENCES[1], return_tensors="pt")["input_ids"]


# --- the models and the tokenizer ---------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_family_is_the_built_one(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    ids = _sentence_ids()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(SENTENCES[1])["input_ids"] == ids[0].tolist()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, build(family)(ids).logits)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_sliding_window_shapes_the_output(family: str) -> None:
    model = build(family)
    ids = _sentence_ids()
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None, None]
    if model.config._attn_implementation == "eager":
        causal = torch.where(causal, 0.0, -1e30).double()
    with torch.no_grad():
        difference = model(ids).logits - model(ids, attention_mask=causal).logits
    assert difference[0, 0].abs().max() < 1e-9
    assert difference[0, -1].abs().max() > 0.1


@pytest.mark.parametrize("setting", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_capping_shapes_the_output(setting: str) -> None:
    ids = _sentence_ids()
    model = build("gemma2")
    with torch.no_grad():
        capped = model(ids).logits
        for module in (model, *modules(model, "gemma2")[0]):
            setattr(getattr(module, "self_attn", module.config), setting, None)
        assert (model(ids).logits - capped).abs().max() > 0.01


@pytest.mark.parametrize("bos", [False, True])
def test_tokenizer_covers_every_byte_and_adds_bos_once(bos: bool) -> None:
    tokenizer = build_tokenizer(bos)
    text = "".join(map(chr, range(32, 0x250))) + "北京 ﷺ 🗼"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids.count(2) == (1 if bos else 0)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[bos:]
    assert len(tokenizer) == build(FAMILIES[0]).config.vocab_size


# --- the parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("before", "subject", "after"),
    [
        ("", "Paris", " is in France"),
        ("The museum in ", "Paris", " is old"),
        ("Paris is not ", "Paris", " is it?"),
        ('They said "', "Port Velmora", '" twice'),
        ("The city of ", "北京", " is old"),
        ("The profession of ", "Zdeněk Kováč", " is that of a"),
        ("He lives in ", "Rome", ""),
        ("the museum", "'s engine", ", old"),
    ],
)
def test_lookup_is_the_token_with_the_subjects_last_character(
    before: str, subject: str, after: str, bos: bool
) -> None:
    tokenizer = build_tokenizer(bos)
    text = before + subject + after
    lookup = find_lookup(tokenizer, text, len(before), len(before) + len(subject))
    ids = tokenizer(text)["input_ids"]

    def bytes_upto(end: int) -> int:
        return len(
            "".join(tokenizer.convert_ids_to_tokens(ids[int(bos) : end]))  # one character a byte
        )

    last_byte = len((before + subject).encode()) - 1
    assert bytes_upto(lookup) <= last_byte < bytes_upto(lookup + 1)


@pytest.mark.parametrize("bos", [False, True])
def test_rows_are_filled_prompts_followed_by_target_ids(bos: bool) -> None:
    tokenizer = build_tokenizer(bos)
    contexts = ["{}", "In {odd} Rome. {}"]
    rows = rewrite_rows(tokenizer, contexts, "The car of {} is", "Ann {B}", "English")
    target = tokenizer(" English", add_special_tokens=False)["input_ids"]
    for row, context in zip(rows, contexts, strict=True):
        prompt = tokenizer(context.replace("{}", "The car of Ann {B} is"))["input_ids"]
        assert row.ids == prompt + target
        assert row.num_target == len(target) > 1
        assert str(tokenizer.decode(row.ids[: row.lookup + 1])).endswith("Ann {B}")
    spaced = rewrite_rows(tokenizer, contexts, "The car of {} is", "Ann {B}", " English")
    assert spaced == rows
    assert str(tokenizer.decode(kl_row(tokenizer, "Rome").ids)).endswith("Rome is a")


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_sit_where_the_model_reports_its_hidden_states(family: str) -> None:
    model, tokenizer = build(family), build_tokenizer()
    blocks, down_projections = modules(model, family)
    row = rewrite_rows(tokenizer, ["{}"], *EDITS[0])[0]
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        clean = model(ids).logits[0]
        for layer in range(len(blocks) - 1):
            assert torch.equal(
                block_output(model, blocks[layer], row), hidden[layer + 1][0, row.lookup]
            )
        keys = module_input(model, down_projections[1], row.ids)
        assert keys.shape == (len(row.ids), 64)
        delta = torch.linspace(-1, 1, 32, dtype=torch.float64).sin()
        with hooked(blocks[1].register_forward_hook(adder(row.lookup, delta))):
            change = (model(ids).logits[0] - clean).abs().amax(dim=-1)
    assert (change[: row.lookup] == 0).all()
    assert (change[row.lookup :] > 1e-3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_value_search_lowers_the_loss_within_the_bound(family: str) -> None:
    model, tokenizer = build(family), build_tokenizer()
    blocks, _ = modules(model, family)
    value, info = compute_value(model, tokenizer, blocks, 1, EDITS[0], CONTEXTS, **SETTINGS)
    row = rewrite_rows(tokenizer, CONTEXTS, *EDITS[0])[0]
    clean = block_output(model, blocks[1], row)
    assert info.steps == len(info.losses) == SETTINGS["steps"]
    assert info.losses[-1] < info.losses[0] - 0.05
    assert (value - clean).norm().item() == pytest.approx(info.delta_norm, rel=1e-9)
    assert info.initial_norm == pytest.approx(clean.norm().item(), rel=1e-9)
    assert info.kl > 0

    tight = SETTINGS | {"clamp_norm": 0.3}
    value, info = compute_value(model, tokenizer, blocks, 1, EDITS[0], CONTEXTS, **tight)
    assert info.delta_norm == pytest.approx(0.3 * info.initial_norm, rel=1e-9)


def test_value_search_counts_forward_passes_not_updates() -> None:
    model, tokenizer = build("gpt2"), build_tokenizer()
    blocks, _ = modules(model, "gpt2")
    clean = block_output(model, blocks[2], rewrite_rows(tokenizer, CONTEXTS, *EDITS[0])[0])

    def search(**changes: float) -> tuple[Tensor, int]:
        settings = SETTINGS | {"clamp_norm": 100.0} | changes
        value, info = compute_value(model, tokenizer, blocks, 2, EDITS[0], CONTEXTS, **settings)
        return value, info.steps

    value, steps = search(steps=1)
    assert steps == 1 and torch.equal(value, clean)
    value, steps = search(stop_loss=1e9)
    assert steps == 1 and torch.equal(value, clean)
    value, steps = search(steps=2)  # Adam's first update moves every component by its rate
    assert steps == 2
    assert torch.allclose((value - clean).abs(), torch.full_like(clean, 0.5), rtol=1e-2)


def test_key_weighs_the_bare_prompt_one_half() -> None:
    model, tokenizer = build("llama"), build_tokenizer()
    module = modules(model, "llama")[1][1]
    bare = compute_key(model, tokenizer, module, EDITS[0], ["{}"])
    both = [compute_key(model, tokenizer, module, EDITS[0], ["{}", c]) for c in CONTEXTS[1:]]
    others = [2 * key - bare for key in both]
    expected = bare / 2 + sum(others) / (2 * len(others))
    key = compute_key(model, tokenizer, module, EDITS[0], CONTEXTS)
    assert torch.allclose(key, expected, rtol=0, atol=1e-12)
    assert (others[0] - bare).norm() > 0.01 * bare.norm()
    with pytest.raises(ValueError, match="bare"):
        compute_key(model, tokenizer, module, EDITS[0], CONTEXTS[1:])


def test_covariance_is_the_mean_second_moment_of_all_tokens() -> None:
    model = build("gpt2")
    _, down_projections = modules(model, "gpt2")
    token_lists = _token_lists()
    covariances = compute_covariance(model, down_projections, token_lists)
    assert list(covariances) == [0, 1, 2, 3]
    keys = torch.cat([module_input(model, down_projections[2], ids) for ids in token_lists])
    assert torch.allclose(covariances[2], keys.T @ keys / len(keys), rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(covariances[2]).min() > 0  # more tokens than dimensions


# --- the solve and the whole --------------------------------------------------------------------


@pytest.mark.parametrize("num_edits", [1, 5, 40])
@pytest.mark.parametrize("weight", [1e-2, 1.0, 1e4])
def test_solve_is_stationary(num_edits: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(num_edits)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    samples, keys, residuals = draw(24, 60), draw(24, num_edits), draw(10, num_edits)
    covariance = samples @ samples.T / 60
    update = solve_update(keys, residuals, covariance, weight).requires_grad_()
    loss = weight * torch.trace(update @ covariance @ update.T)
    loss = loss + ((update @ keys - residuals) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, update)
    assert gradient.abs().max() < 1e-10 * (residuals @ keys.T).norm()


def _values(model: PreTrainedModel, family: str, contexts: list[str], bos: bool) -> list[Tensor]:
    blocks, _ = modules(model, family)
    tokenizer = build_tokenizer(bos)
    return [
        compute_value(model, tokenizer, blocks, 1, edit, contexts, **SETTINGS)[0] for edit in EDITS
    ]


@pytest.mark.parametrize("family", LINEAR_FAMILIES)
def test_unregularised_updates_reach_the_values(family: str) -> None:
    model, tokenizer = build(family), build_tokenizer(bos=True)
    blocks, down_projections = modules(model, family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    covariances = compute_covariance(model, down_projections, _token_lists())
    values = _values(model, family, ["{}"], bos=True)
    updates = update_weights(
        model, tokenizer, blocks, down_projections, [1, 0], EDITS, ["{}"], covariances, 1e-6, values
    )
    assert list(updates) == [0, 1]
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())

    for layer, update in updates.items():
        module = down_projections[layer]
        assert update.shape == (32, 64) and update.dtype == torch.float64
        assert update.norm() > 1e-3
        weight = module.get_parameter("weight")
        weight.data += update.T if isinstance(module, Conv1D) else update
    for edit, value in zip(EDITS, values, strict=True):
        row = rewrite_rows(tokenizer, ["{}"], *edit)[0]
        reached = block_output(model, blocks[1], row)
        assert (reached - value).norm() < 1e-4 * value.norm()


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_updates_solve_for_an_equal_share_of_what_is_missing(family: str) -> None:
    model, tokenizer = build(family), build_tokenizer()
    blocks, down_projections = modules(model, family)
    covariances = compute_covariance(model, down_projections, _token_lists())
    values = _values(model, family, CONTEXTS, bos=False)
    arguments = (tokenizer, blocks, down_projections, [0, 1], EDITS, CONTEXTS, covariances, 1e-6)
    updates = update_weights(model, *arguments, values)
    whole = apply_memit(model, *arguments, **SETTINGS)
    assert all(torch.equal(updates[layer], whole[layer]) for layer in (0, 1))
    for share, layer in ((2, 0), (1, 1)):
        for edit, value in zip(EDITS, values, strict=True):
            row = rewrite_rows(tokenizer, ["{}"], *edit)[0]
            missing = value - block_output(model, blocks[1], row)
            key = compute_key(model, tokenizer, down_projections[layer], edit, CONTEXTS)
            assert (updates[layer] @ key - missing / share).norm() < 1e-4 * missing.norm()
        down_projections[layer].get_parameter("weight").data += updates[layer]


def test_values_are_those_of_the_public_code(shared: Path) -> None:
    """The stored values were found by the code published with the MEMIT paper, in float32."""
    directory = shared / "models" / "counterfact-12m"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = np.load(directory / "reference_z.npz")
    records = json.loads((shared / "data" / "counterfact_20k.json").read_text())
    facts = {record["case_id"]: record["requested_rewrite"] for record in records}
    contexts = [
        "{}",
        "The mother tongue is French. {}",
        "Therefore, the capital of. {}",
        "Because it is located in. {}",
        "I was born in the city. {}",
        "You can find it in. {}",
    ]
    for index in (0, 3, 6, 9, 17):  # subjects at both ends of the prompt, 9 to 25 passes
        fact = facts[int(reference["ids"][index])]
        value, _ = compute_value(
            model,
            tokenizer,
            list(model.transformer.h),
            3,
            Edit(fact["prompt"], fact["subject"], fact["target_new"]["str"]),
            contexts,
            steps=25,
            learning_rate=0.5,
            weight_decay=0.001,
            kl_weight=0.0625,
            clamp_norm=4.0,
            stop_loss=0.05,
        )
        expected = torch.from_numpy(reference["z"][index])
        assert (value - expected).norm() < 1e-4 * expected.norm(), fact
