"""T-Patcher's patches: against the plain loop, and what the method's sheet asks of them."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from pipeline.editing.adapters import NeuronBank
from pipeline.editing.patches import PatchSettings, activation_loss, memory_losses, positive_mean
from pipeline.editing.patching import PatchedEdit, QueryMemory, train_patches
from pipeline.editing.queries import ffn_queries, queries_of
from pipeline.editing.update import EditedWeights
from tests import families
from tests.cases import EDITS, Case, case, draw, fresh, relative_error, token_rows
from tests.encoder_decoders import Behind
from tests.oracles import patches as oracle

FAMILY_NAMES = ["gpt2", "gptj", "llama", "qwen2", "gemma2", "gpt_neox"]
LAST = families.NUM_LAYERS - 1
FEW = PatchSettings(steps=4, least_steps=4, check_every=4, memory_top=7, value_scale=1.0)
TWO = EDITS[:2]


def _memory(tiny: Case, layer: int = LAST) -> QueryMemory:
    queries = ffn_queries(tiny.editable, layer, token_rows(4, below=300), 1024)
    return QueryMemory((queries[:20], queries[20:40]), (queries[40:60],))


def _train(
    tiny: Case, settings: PatchSettings = FEW, layer: int = LAST, edits: list[int] | None = None
) -> list[PatchedEdit]:
    chosen = [0, 1] if edits is None else edits
    prompts = tiny.prompts([EDITS[i] for i in chosen], ["{}"])
    memory = _memory(tiny, layer)
    return train_patches(tiny.editable, layer, prompts, memory, settings, chosen, 1024)


def _oracle(tiny: Case, edit: int, layer: int, settings: PatchSettings) -> oracle.Patched:
    (prompt,) = tiny.prompts([EDITS[edit]], ["{}"])
    memory = torch.cat(_memory(tiny, layer).trained)
    generator = torch.Generator().manual_seed(edit)
    up, editable = tiny.editable.up_projection(layer), tiny.editable
    ids, target, model = list(prompt.rewrites[0].ids), list(prompt.target), tiny.model
    if prompt.start is not None:
        model, ids = Behind(editable.model, ids), [prompt.start]
    sequence, logits = [*ids, *target[:-1]], None
    _, logits = oracle.queries_of(model, up, sequence)
    wrong = (logits[len(ids) - 1 :].argmax(1) != torch.tensor(target)).sum()
    shape = (min(int(wrong), settings.max_patches), editable.hidden_size)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    activation = ACT2FN[editable.activation]
    parts = model, up, editable.down_projection(layer), activation, ids, target
    return oracle.train(*parts, memory, drawn, asdict(settings), settings.steps)


def _agree(found: NeuronBank, expected: oracle.Patched) -> None:
    for name, part in found.parts.items():
        assert relative_error(part, getattr(expected, name)) < 2e-6, name


@pytest.mark.parametrize("family", [*FAMILY_NAMES, "t5", "t5_gated"])
def test_patches_are_those_of_the_plain_loop(family: str) -> None:
    tiny = case(family)
    for edit, found in enumerate(_train(tiny)):
        assert found.steps == 4
        _agree(found.bank, _oracle(tiny, edit, LAST, FEW))


@pytest.mark.parametrize(
    "settings",
    [
        replace(FEW, form="margin", activation_threshold=2.0),
        replace(FEW, label_smoothing=0.1, max_patches=1, clip_norm=0.1),
    ],
)
def test_other_forms_are_those_of_the_plain_loop(settings: PatchSettings) -> None:
    tiny = case("gpt2")
    (found,) = _train(tiny, settings, edits=[1])
    _agree(found.bank, _oracle(tiny, 1, LAST, settings))


@pytest.mark.parametrize(
    ("layer", "family"), [(0, "llama"), (1, "llama"), (0, "t5"), (1, "t5_gated")]
)
def test_lower_blocks_are_patched_at_every_position(layer: int, family: str) -> None:
    """There a patch acts inside the prompt too, and later positions see what it did."""
    tiny = case(family)
    (found,) = _train(tiny, layer=layer, edits=[1])
    _agree(found.bank, _oracle(tiny, 1, layer, FEW))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_at_first_every_patch_answers_with_one_to_its_own_query(family: str) -> None:
    """Patches that no step was made with; the queries are those of plain passes."""
    tiny = case(family)
    settings = replace(FEW, steps=0, least_steps=0, check_every=1)
    for edit, found in enumerate(_train(tiny, settings)):
        (prompt,) = tiny.prompts([EDITS[edit]], ["{}"])
        ids, target = list(prompt.rewrites[0].ids), list(prompt.target)
        up, parts = tiny.editable.up_projection(LAST), found.bank.parts
        queries, logits = oracle.queries_of(tiny.model, up, [*ids, *target[:-1]])
        wrong = logits[len(ids) - 1 :].argmax(1) != torch.tensor(target)
        own = queries[len(ids) - 1 :][wrong][: settings.max_patches]
        inner = (own * parts["keys"].double()).sum(1)
        # Parts are kept in float32.
        assert torch.allclose(inner, torch.ones(len(own)).double(), atol=1e-6)
        assert not parts["biases"].any() and found.bank.num_neurons == len(own) > 0


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_there_is_a_patch_for_every_wrong_token(family: str) -> None:
    tiny = case(family)
    prompts = tiny.prompts(EDITS, ["{}"])
    found = _train(tiny, replace(FEW, steps=0, least_steps=0, check_every=1), edits=[0, 1, 2, 3])
    for edit, prompt in zip(found, prompts[:4], strict=True):
        ids, target = list(prompt.rewrites[0].ids), list(prompt.target)
        up = tiny.editable.up_projection(LAST)
        _, logits = oracle.queries_of(tiny.model, up, [*ids, *target[:-1]])
        wrong = int((logits[len(ids) - 1 :].argmax(1) != torch.tensor(target)).sum())
        assert edit.bank.num_neurons == min(wrong, 5) > 0


def test_what_the_model_says_already_needs_no_patch() -> None:
    tiny = fresh("gpt2")
    (prompt,) = tiny.prompts(EDITS[:1], ["{}"])
    ids, target = list(prompt.rewrites[0].ids), []
    for _ in range(3):
        _, logits = oracle.queries_of(tiny.model, tiny.editable.up_projection(LAST), ids)
        target.append(int(logits[-1].argmax()))
        ids.append(target[-1])
    said = replace(prompt, target=tuple(target))
    (found,) = train_patches(tiny.editable, LAST, [said], _memory(tiny), FEW, [0], 1024)
    assert found.bank.num_neurons == 0 and found.steps == 0 and found.least_activation is None
    assert 0 < found.target_probability < 1


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_trained_patches_answer_to_their_token_and_to_no_remembered_query(family: str) -> None:
    tiny = fresh(family)
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    # In 32 dimensions few queries can be told from the patch's own.
    queries = ffn_queries(tiny.editable, LAST, token_rows(2), 1024)
    memory = QueryMemory((queries[:8],), (queries[8:16],))
    (prompt,) = tiny.prompts([EDITS[1]], ["{}"])
    prompt = replace(prompt, target=prompt.target[:1])
    ids, target = list(prompt.rewrites[0].ids), list(prompt.target)
    up = tiny.editable.up_projection(LAST)
    _, logits = oracle.queries_of(tiny.model, up, ids)
    unpatched_rank = int((logits[-1] > logits[-1, target[0]]).sum())
    settings = PatchSettings(steps=400, value_scale=1.0)
    (found,) = train_patches(tiny.editable, LAST, [prompt], memory, settings, [1], 1024)
    own = (found.bank.parts["queries"] * found.bank.parts["keys"]).sum(1)
    own += found.bank.parts["biases"]
    assert bool((own > 0).all())
    inner = queries[:8].float() @ found.bank.parts["keys"].T + found.bank.parts["biases"]
    assert float(inner.max()) < 0
    assert found.least_activation == pytest.approx(float(own.min()), rel=1e-4)
    weights = EditedWeights(tiny.editable, (LAST,))
    weights.apply(LAST, found.bank)
    _, logits = oracle.queries_of(tiny.model, up, ids)
    # A norm behind Gemma's network bounds what any patch can do in a model of random weights.
    likeliest, rank = int(logits[-1].argmax()), int((logits[-1] > logits[-1, target[0]]).sum())
    assert rank < unpatched_rank if family == "gemma2" else likeliest == target[0]
    after = tiny.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_edits_trained_side_by_side_are_those_trained_alone() -> None:
    tiny = case("gpt2")
    settings = replace(FEW, steps=6, check_every=2)
    beside = _train(tiny, settings, edits=[0, 1, 2])
    for edit, found in enumerate(beside):
        (alone,) = _train(tiny, settings, edits=[edit])
        for name, part in found.bank.parts.items():
            assert relative_error(part, alone.bank.parts[name]) < 1e-6


# --- losses -------------------------------------------------------------------------------------


def _inner(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    keys = draw(3, 8, seed=seed).requires_grad_()
    biases = draw(3, seed=seed + 1).requires_grad_()
    own = (draw(3, 8, seed=seed + 2) * keys).sum(1) + biases
    return keys, biases, own, [draw(30, 8, seed=seed + 3), draw(10, 8, seed=seed + 4)]


@pytest.mark.parametrize("form", ["exp-topk", "margin"])
def test_the_difference_loss_has_no_gradient_in_the_bias(form: str) -> None:
    keys, biases, own, memory = _inner()
    settings = replace(PatchSettings(), form=form, memory_top=7)
    found = memory_losses(keys, biases, own, memory, settings)
    (gradient,) = torch.autograd.grad(found.difference.sum(), biases, retain_graph=True)
    assert not gradient.any()
    (other,) = torch.autograd.grad(found.memory.sum(), biases)
    assert float(other.abs().min()) > 1e-3


@pytest.mark.parametrize("form", ["exp-topk", "margin"])
def test_losses_are_the_plain_sums(form: str) -> None:
    keys, biases, own, memory = _inner(5)
    settings = replace(PatchSettings(), form=form, memory_top=7, activation_threshold=0.5)
    found = memory_losses(keys, biases, own, memory, settings)
    for p in range(3):
        inner = [query @ keys[p] + biases[p] for query in torch.cat(memory)]
        over, near = [a + 3 for a in inner], [a - own[p] + 3 for a in inner]
        plain = [oracle.exp_topk(n, 7) if form == "exp-topk" else oracle.margin(n)
                 for n in (over, near)]  # fmt: skip
        assert float(found.memory[p]) == pytest.approx(float(plain[0]))
        assert float(found.difference[p]) == pytest.approx(float(plain[1]))
        assert float(found.greatest[p]) == pytest.approx(float(max(inner)))
    silent = [0.5 - a for a in own]
    plain_own = oracle.exp_topk(silent, 5) if form == "exp-topk" else oracle.margin(silent)
    assert float(activation_loss(own, settings)) == pytest.approx(float(plain_own))


def test_no_memory_and_nothing_positive_cost_nothing() -> None:
    keys, biases, own, _ = _inner()
    found = memory_losses(keys, biases, own, [torch.zeros(0, 8).double()], PatchSettings())
    assert float(found.memory.abs().sum()) == 0 == float(found.difference.abs().sum())
    nothing = positive_mean(-torch.ones(2, 3, requires_grad=True))
    assert nothing.tolist() == [0, 0]
    nothing.sum().backward()


def test_a_memory_is_not_copied_where_it_is_used() -> None:
    """Tens of thousands of queries, of which every round's edits would have a copy."""
    memory = QueryMemory((draw(6, 8).float(), draw(2, 8, seed=1).float()), (draw(3, 8).float(),))
    near = memory.on(torch.device("cpu"), torch.float32)
    for mine, theirs in ((near.trained, memory.trained), (near.watched, memory.watched)):
        assert [part.data_ptr() for part in mine] == [part.data_ptr() for part in theirs]
    wide = memory.on(torch.device("cpu"), torch.float64).trained[0]
    assert torch.equal(wide, memory.trained[0].double())


# --- queries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("layer", [1, LAST])
def test_queries_are_those_of_the_texts_one_by_one(family: str, layer: int) -> None:
    tiny = case(family)
    rows = token_rows(5)
    up = tiny.editable.up_projection(layer)
    expected = [oracle.queries_of(tiny.model, up, row)[0][1:] for row in rows]
    found = ffn_queries(tiny.editable, layer, rows, 64)
    assert len(found) == sum(len(row) - 1 for row in rows)
    assert relative_error(found, torch.cat(expected)) < tiny.tolerance


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_a_decoders_queries_are_of_the_second_halves_of_texts(family: str) -> None:
    tiny, layer = case(family), LAST
    rows = [[*row, 1] for row in token_rows(4, below=300)]
    expected = []
    for row in rows:
        half = (len(row) - 1) // 2
        behind = Behind(tiny.editable.model, [*row[:half], 1])
        up = tiny.editable.up_projection(layer)
        expected.append(oracle.queries_of(behind, up, [0, *row[half:-1]])[0])
    found = ffn_queries(tiny.editable, layer, rows, 64)
    assert relative_error(found, torch.cat(expected)) < tiny.tolerance
    for row, queries in zip(rows, expected, strict=True):
        assert abs(queries_of(len(row), tiny.editable.answers) - len(queries)) <= 0.5
    # Cut off, a text has no end token of its own.
    cut = [[*rows[0][:6]], [*rows[0][:6], 1]]
    once, twice = (ffn_queries(tiny.editable, layer, [row], 64) for row in cut)
    assert torch.equal(once, twice)
