"""What training wants of the networks, against autograd through the whole of it."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.editing.conditions import conditions_of, greedy
from pipeline.editing.locality import KeptRow
from pipeline.editing.update import EditedWeights
from pipeline.errors import InputError
from pipeline.methods import build_trainable, resolve_training
from pipeline.methods.edit_examples import EditExample, asked_rows, draw_examples, kept_rows
from pipeline.methods.hyper_training import HyperTrainable, factors_of
from pipeline.methods.trainable import Measured, Shapes, Trainer
from pipeline.requests import EditRequest, LocalityProbe
from pipeline.spec import parse_spec
from tests.cases import EDITS, Case, case, relative_error, requests
from tests.encoder_decoders import Behind
from tests.oracles import hypernetworks as oracle

LAYERS = (1, 3)
OWN: dict[str, dict[str, Any]] = {
    "mend": {"rank": 4, "edit_rate": 0.05},
    "malmen": {"rank": 4, "edit_rate": 0.05},
    "ke": {"condition_size": 8, "hidden_size": 8, "lstm_size": 4, "max_scale": 2.0},
}


def _trainable(name: str, **train: Any) -> HyperTrainable:
    own = {"name": name, "layers": LAYERS, "contexts": ["{}"], name: OWN[name]}
    settings = {"edit_weight": 0.7, "locality_weight": 0.3, **train}
    spec = resolve_training(parse_spec({"method": own, "train": settings}, "the test"))
    found = build_trainable(spec)
    assert isinstance(found, HyperTrainable)
    return found


def _examples(count: int) -> list[EditExample]:
    """Edits asked in other words, with questions and a text to leave alone."""
    left = [("The mother tongue of Oduya is", "French and Dutch"), ("The river is long and", None)]
    return [
        EditExample(request, f"It is old. {request.text}", left[number % 2])
        for number, request in enumerate(requests(EDITS[:count]))
    ]


def _shapes(tiny: Case) -> Shapes:
    sizes = {layer: tiny.editable.key_size(layer) for layer in LAYERS}
    return Shapes(tiny.editable.hidden_size, sizes)


def _plain_loss(tiny: Case, trainable: HyperTrainable, examples: list[EditExample]) -> Any:
    given = tiny.tokenizer, examples, tiny.editable.answers
    asked = [(list(e.rewrites[0].ids), list(e.target)) for e in asked_rows(*given)]
    rows = kept_rows(*given, max_tokens=64, answers_only=trainable.answers_only)
    left = [_in_one_stream(row) for row in rows]

    def loss(updates: dict[int, Tensor]) -> Tensor:
        return oracle.edited_loss(
            tiny.model,
            {layer: tiny.editable.weight_name(layer) for layer in LAYERS},
            {layer: tiny.down_projections[layer] for layer in LAYERS},
            updates,
            asked,
            left,
            edit_weight=0.7,
            locality_weight=0.3,
            smoothing=trainable.smoothing,
        )

    return loss


def _in_one_stream(row: KeptRow) -> tuple[list[int], range]:
    """Token ids and places; what an encoder reads stands in the place of the start token."""
    before = [] if row.source is None else list(row.source)
    own = list(row.ids) if row.source is None else list(row.ids[1:])
    shift = max(0, len(before) - 1)
    return [*before, *own], range(row.places[0] + shift, row.places[-1] + shift + 1)


def _moved(trainer: Any, scale: float) -> Any:
    """Its network in float64, moved from where it begins."""
    network = trainer.module.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "rates" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.double())
    return network


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("mend", family) for family in ("gpt2", "gptj", "llama", "qwen2")),
        ("mend", "t5_gated"),
        ("ke", "gpt2"),
        ("ke", "llama"),
        ("ke", "t5"),
    ],
)
def test_a_pieces_gradients_are_those_of_autograd_through_its_batches(
    name: str, family: str
) -> None:
    tiny, trainable = case(family), _trainable(name)
    size = 1 if name == "ke" else 2
    examples = _examples(2 * size)
    batches = [tuple(examples[:size]), tuple(examples[size:])]
    weights = EditedWeights(tiny.editable, LAYERS)
    network = _moved(trainable.trainer(_shapes(tiny), None), 0.05)
    shared = {"network": network.state_dict(), "weights": trainable.weights}
    learner: Any = trainable.learner(weights, tiny.tokenizer)
    learner.network.double()
    found = learner.contribute(batches, 0, shared, learns=True)
    measured = learner.contribute(batches, 0, shared, learns=False)

    network.take(network.seen_in(factors_of(trainable, weights, tiny.tokenizer, examples)))
    losses = []
    for batch in batches:
        factors = factors_of(trainable, weights, tiny.tokenizer, batch)
        losses.append(_plain_loss(tiny, trainable, list(batch))(network.updates(factors)))
    loss = torch.stack(losses).mean()
    named = dict(network.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    assert found.count == len(examples)
    assert found.measures["loss"] / found.count == pytest.approx(float(loss.detach()), rel=1e-4)
    assert 0 <= measured.measures["success"] <= found.count
    total = 0.0
    for (parameter, _), gradient in zip(named.items(), gradients, strict=True):
        if gradient is None:
            continue
        total += float(gradient.norm())
        mine = found.gradients[parameter] / found.count
        assert torch.allclose(mine, gradient, rtol=2e-3, atol=1e-4 * float(gradient.norm())), (
            parameter
        )
    assert total > 0 and weights.version == 0


def test_edits_that_there_is_no_memory_to_try_together_are_tried_one_by_one() -> None:
    tiny, trainable = case("gpt2"), _trainable("ke")
    batches = [(example,) for example in _examples(3)]
    weights = EditedWeights(tiny.editable, LAYERS)
    learner: Any = trainable.learner(weights, tiny.tokenizer)
    shared = {"network": learner.network.state_dict(), "weights": trainable.weights}
    together = learner.contribute(batches, 0, shared, learns=True)
    learner._at_once = 1
    alone = learner.contribute(batches, 0, shared, learns=True)
    assert together.count == alone.count == 3
    assert together.measures == pytest.approx(alone.measures, rel=1e-4)
    assert together.gradients.keys() == alone.gradients.keys()
    for name, gradient in together.gradients.items():
        assert relative_error(alone.gradients[name], gradient) < 1e-3, name


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_malmens_two_passes_are_autograd_through_the_edit(family: str) -> None:
    tiny, trainable = case(family), _trainable("malmen", batch_size=4)
    examples = _examples(4)
    weights = EditedWeights(tiny.editable, LAYERS)
    learner = trainable.learner(weights, tiny.tokenizer)
    trainer: Any = trainable.trainer(_shapes(tiny), None)
    network = _moved(trainer, 0.05)
    pieces = [examples[:3], examples[3:]]
    assert trainer.begin(learns=True) is None
    for piece in pieces:
        trainer.add(learner.contribute(piece, 0, None, learns=True))
    changes = trainer.end_pass(0)
    for piece in pieces:
        trainer.add(learner.contribute(piece, 1, changes, learns=True))

    joined = factors_of(trainable, weights, tiny.tokenizer, examples)
    before = network.gradients(joined, {k: slope / 4 for k, slope in trainer._slopes.items()})
    updates = {layer: change.double().requires_grad_() for layer, change in changes.items()}
    loss = _plain_loss(tiny, trainable, examples)(updates)
    slopes = torch.autograd.grad(loss, list(updates.values()))
    for layer, slope in zip(LAYERS, slopes, strict=True):
        assert relative_error(trainer._slopes[layer] / 4, slope) < 1e-4
    # From the slopes on, the gradients are tested with the network's own.
    first = {name: parameter.clone() for name, parameter in network.named_parameters()}
    measured = trainer.end()
    assert measured.count == 4
    assert measured.measures["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    rate = trainable.train.learning_rate
    assert rate is not None
    for name, parameter in network.named_parameters():
        # Adam's first step is the gradient's sign.
        moved, sign = (parameter - first[name]) / rate, before[name].sign()
        clear = before[name].abs() > 1e-4 * before[name].abs().max()
        assert torch.allclose(moved[clear], -sign[clear], atol=1e-2), name


def test_the_multiplier_grows_while_the_model_moves_too_far_and_shrinks_else() -> None:
    tiny, trainable = case("gpt2"), _trainable("ke")

    def after(divergence: float, success: float = 0.0) -> Any:
        trainer: Any = trainable.trainer(_shapes(tiny), None)
        trainer.begin(learns=True)
        measures = {"loss": 1.0, "edit_loss": 1.0, "locality_loss": divergence}
        trainer._measures, trainer._count = measures, 1
        trainer.end()
        trainer.validated(Measured(1, {**measures, "success": success}))
        return trainer

    first = trainable.weights.locality
    assert after(0.501).multiplier == pytest.approx(first + 0.1 * 0.5)
    assert after(0.0).multiplier == pytest.approx(first - 0.1 * 1e-3)
    assert after(0.501, 1.0).margin == pytest.approx(8e-4) and after(0.5, 0.5).margin == 1e-3
    again = trainable.trainer(_shapes(tiny), after(0.501, 1.0).state())
    assert again.multiplier == pytest.approx(first + 0.05)  # type: ignore[attr-defined]
    assert again.margin == pytest.approx(8e-4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["mend", "malmen", "ke"])
def test_a_trainer_goes_on_from_its_state_to_the_same_bits(name: str) -> None:
    tiny, trainable = case("gpt2"), _trainable(name, learning_rate=0.01)

    def step(trainer: Trainer, seed: int) -> None:
        module = trainer.module  # type: ignore[attr-defined]
        generator = torch.Generator().manual_seed(seed)
        gradients = {
            key: torch.randn(parameter.shape, generator=generator)
            for key, parameter in module.named_parameters()
        }
        trainer.learn(gradients, 2)  # type: ignore[attr-defined]

    whole = trainable.trainer(_shapes(tiny), None)
    for seed in range(2):
        step(whole, seed)
    whole.validated(Measured(1, {"loss": 1.0, "success": 0.0}))
    again = trainable.trainer(_shapes(tiny), whole.state())
    for trainer in (whole, again):
        step(trainer, 2)
    assert whole.since_best == again.since_best == 0
    for state in ("state", "editor"):
        one, other = getattr(whole, state)(), getattr(again, state)()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_models_own_answer_is_its_likeliest_tokens() -> None:
    tiny = case("qwen2")
    prompt = tiny.tokenizer("The mother tongue of Anselm is")["input_ids"]
    found = greedy(tiny.editable, [prompt], [3])[0]
    ids = torch.tensor([prompt])
    expected = tiny.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3, pad_token_id=0
    )
    assert list(found) == expected[0, len(prompt) :].tolist()


@torch.no_grad()
def test_a_decoders_own_answer_goes_on_past_its_end() -> None:
    """KE reads as many tokens of the old answer as the new one has."""
    tiny = case("t5")
    edits = tiny.prompts(EDITS[:2], ["{}"])
    table = tiny.editable.model.get_input_embeddings().weight
    for edit, condition in zip(edits, conditions_of(tiny.editable, edits), strict=True):
        behind, ids = Behind(tiny.editable.model, edit.rewrites[0].ids), [0]
        for _ in edit.target:
            ids.append(int(behind(torch.tensor([ids])).logits[0, -1].argmax()))
        assert torch.equal(condition.old, table[ids[1:]])
        assert torch.equal(condition.new, table[list(edit.target)])
        assert torch.equal(condition.prompt, table[list(edit.rewrites[0].ids)])
    count = max(len(edit.target) for edit in edits)
    prompts = [edit.rewrites[0].ids for edit in edits]
    assert [len(one) for one in greedy(tiny.editable, prompts, [count, 1])] == [count, 1]


def test_a_text_is_left_alone_by_the_decoder_behind_its_first_half() -> None:
    tiny, examples = case("t5"), _examples(2)
    rows = kept_rows(
        tiny.tokenizer, examples, tiny.editable.answers, max_tokens=64, answers_only=False
    )
    answer = tiny.tokenizer("French and Dutch")["input_ids"]
    prompt = tiny.tokenizer("The mother tongue of Oduya is")["input_ids"]
    assert rows[0] == KeptRow((0, *answer[:-1]), tuple(range(len(answer))), tuple(prompt))
    text = tiny.tokenizer("The river is long and")["input_ids"][:-1]
    half = len(text) // 2
    assert rows[1].source == (*text[:half], 1) and rows[1].ids == (0, *text[half:])
    assert rows[1].places == tuple(range(len(text) - half + 1))


def _request(number: int, **fields: Any) -> EditRequest:
    return EditRequest(
        case_id=str(number), subject=f"A{number}", prompt="{} is in", target_new="Rome", **fields
    )


def test_examples_are_asked_by_paraphrases_and_leave_other_answers_alone() -> None:
    plain = _request(0)
    whole = _request(
        1,
        target_true="Paris",
        paraphrase_prompts=("Where is A1? In",),
        neighborhood_prompts=("B is in",),
        locality=(LocalityProbe(prompt="C speaks", target="Czech"),),
    )
    drawn = [
        draw_examples([plain, whole], [plain, whole], [], random.Random(seed), own_prompt_share=0)
        for seed in range(20)
    ]
    assert {example.asked for example, _ in drawn} == {"A0 is in"}
    assert {example.asked for _, example in drawn} == {"Where is A1? In"}
    both = {("B is in", "Paris"), ("C speaks", "Czech")}
    assert {e.left for e, _ in drawn} == {e.left for _, e in drawn} == both
    asked = [
        draw_examples([whole], [whole], [], random.Random(seed), own_prompt_share=0.5)[0].asked
        for seed in range(20)
    ]
    assert set(asked) == {"A1 is in", "Where is A1? In"}
    texts = draw_examples(
        [plain], [plain], ["One text.", "Two."], random.Random(0), own_prompt_share=0
    )
    assert texts[0].left in {("One text.", None), ("Two.", None)}
    with pytest.raises(InputError, match=r"train\.corpus: no request has a locality question"):
        draw_examples([plain], [plain], [], random.Random(0), own_prompt_share=0)


def test_drawn_targets_are_of_the_relation_and_never_the_answer_before() -> None:
    own = {"relation_id": "r", "target_true": "Oslo", "neighborhood_prompts": ("B is in",)}
    made = [_request(n, **own).model_copy(update={"target_new": t}) for n, t in enumerate("abc")]
    made.append(_request(3, **{**own, "target_true": "a"}))
    made.append(_request(4, neighborhood_prompts=("B is in",), target_true="Oslo"))
    new, both = (_trainable("malmen", batch_size=5, draw_targets=which) for which in ("new", "all"))
    spec = parse_spec({"method": {"name": "serac"}, "train": {"batch_size": 5}}, "the test")
    serac = build_trainable(resolve_training(spec))
    drawn: dict[HyperTrainable, list[set[str]]] = {
        one: [set() for _ in made] for one in (new, both)
    }
    for seed in range(60):
        for one, sets in drawn.items():
            (examples,) = one.pieces(made, made, [], random.Random(seed))
            for seen, example, request in zip(sets, examples, made, strict=True):
                seen.add(example.edit.target_new)
                assert example.edit.case_id == request.case_id
        # SERAC draws them without being told to.
        ((batch,),) = serac.pieces(made, made, [], random.Random(seed))
        assert [example.target for example in batch] == [e.edit.target_new for e in examples]
    first = [{"a", "b", "c", "Rome"}] * 3
    assert drawn[new] == [*first, {"b", "c", "Rome"}, {"Rome"}]
    assert drawn[both] == [*first, {"b", "c", "Rome", "Oslo"}, {"Rome"}]


def test_what_is_left_alone_is_an_answer_or_a_whole_text() -> None:
    tokenizer, examples = case("llama").tokenizer, _examples(2)
    answers = kept_rows(tokenizer, examples, max_tokens=3, answers_only=True)
    every = kept_rows(tokenizer, examples, max_tokens=3, answers_only=False)
    prompt = tokenizer(examples[0].left[0])["input_ids"]
    answer = tokenizer(" French and Dutch", add_special_tokens=False)["input_ids"]
    assert list(answers[0].ids) == list(every[0].ids) == prompt + answer[:-1]
    assert answers[0].places == tuple(range(len(prompt) - 1, len(prompt) + len(answer) - 1))
    assert every[0].places == tuple(range(len(every[0].ids)))
    assert len(answers[1].ids) == 3 and answers[1] == every[1]


@pytest.mark.parametrize(
    ("name", "train", "message"),
    [
        ("malmen", {"accumulate": 2}, r"train\.accumulate: malmen makes one batch a step"),
        ("ke", {"batch_size": 2}, r"train\.batch_size: ke makes one edit at a time"),
    ],
)
def test_batches_that_an_editor_cannot_learn_are_refused(
    name: str, train: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _trainable(name, **train).pieces(requests(EDITS), requests(EDITS), [], random.Random(0))
