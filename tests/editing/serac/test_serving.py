"""The served model: the LM's own numbers where no edit holds, h's where one does, mixtures."""

import pytest
import torch
from torch import Tensor

from pipeline.editing.serac.memory import MemoryEntry
from pipeline.editing.serac.router import Mode
from pipeline.editing.serac.serving import SeracModel
from tests.cases import Case
from tests.editing.serac.cases import ENTRIES, FAMILIES, QUERIES, router, setting
from tests.oracles import serac as oracle

NEW = 6
INSIDE, OUTSIDE = QUERIES[1], QUERIES[2]


def served(
    family: str, entries: list[MemoryEntry] = ENTRIES, mode: Mode = "hard"
) -> tuple[Case, SeracModel]:
    case, editor = setting(family)
    return case, SeracModel(case.editable, router(editor, entries, mode), case.tokenizer)


def batch(case: Case, side: str, texts: list[str] = QUERIES) -> dict[str, Tensor]:
    encoded = case.tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def probabilities(case: Case, family: str, number: int, answered: list[int], share: Tensor):  # type: ignore[no-untyped-def]
    _, editor = setting(family)
    routes = router(editor, mode="soft").routes(QUERIES)
    key = {tuple(ids): entry for entry, ids in zip(ENTRIES, prefixes(editor), strict=True)}
    entry = key[tuple(routes.prefixes[number])]
    return oracle.answer_probabilities(
        case.model,
        editor.counterfactual.model.model,
        case.tokenizer,
        QUERIES[number],
        answered,
        oracle.Stored(entry.prompt, entry.target),
        float(share),
    )


def prefixes(editor) -> list[list[int]]:  # type: ignore[no-untyped-def]
    return editor.counterfactual.edit_ids([e.prompt for e in ENTRIES], [e.target for e in ENTRIES])  # type: ignore[no-any-return]


def last(logits: Tensor, real: Tensor, number: int) -> Tensor:
    return logits[number, int(real[number].nonzero().max())]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_with_an_empty_memory_it_is_the_base_model_to_the_bit(family: str, mode: Mode) -> None:
    case, model = served(family, [], mode)
    given = batch(case, "left")
    with torch.no_grad():
        assert torch.equal(model(**given).logits, case.model(**given).logits)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, **options), case.model.generate(**given, **options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_hard_rows_are_one_models_or_the_others(family: str, side: str) -> None:
    case, model = served(family)
    given = batch(case, side)
    with torch.no_grad():
        found, base = model(**given).logits, case.model(**given).logits
    shares = model.router.routes(QUERIES).shares
    for number in range(len(QUERIES)):
        kept = given["attention_mask"][number].bool()
        if shares[number] == 0:
            assert torch.equal(found[number], base[number])  # to the bit, in a batch with others
            continue
        expected = probabilities(case, family, number, [], shares[number])
        at = last(found, given["attention_mask"], number).softmax(-1)
        torch.testing.assert_close(at, expected, rtol=1e-6, atol=1e-9)
        assert not torch.equal(found[number, kept], base[number, kept])
    assert {0.0, 1.0} == set(shares.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_rows_are_a_mixture_that_adds_up_to_one(family: str) -> None:
    case, model = served(family, mode="soft")
    given = batch(case, "right")
    found = model(**given).logits
    shares = model.router.routes(QUERIES).shares
    assert bool(((shares > 0) & (shares < 1)).all())
    for number in range(len(QUERIES)):
        at = last(found, given["attention_mask"], number)
        # The logits are logarithms of probabilities already.
        assert float(at.exp().sum()) == pytest.approx(1, abs=1e-9)
        expected = probabilities(case, family, number, [], shares[number])
        torch.testing.assert_close(at.exp(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_it_generates_what_the_plain_loop_does(family: str, mode: Mode) -> None:
    case, model = served(family, mode=mode)
    given = batch(case, "left")
    width = given["input_ids"].shape[1]
    whole = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    shares = model.router.routes(QUERIES).shares
    for number in range(len(QUERIES)):
        answered: list[int] = []
        while len(answered) < NEW and case.tokenizer.eos_token_id not in answered:
            chances = probabilities(case, family, number, answered, shares[number])
            answered.append(int(chances.argmax()))
        assert whole[number, width:].tolist()[: len(answered)] == answered
    beams = {"num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    assert len(model.generate(**given, max_new_tokens=NEW, **beams)) == 2 * len(QUERIES)


def test_beams_are_those_of_a_model_without_a_cache() -> None:
    """Beams change places between steps, and the second model's cache must not."""
    case, model = served("gpt2", mode="hard")
    given = batch(case, "left", [INSIDE])
    h = setting("gpt2")[1].counterfactual.model.model
    options = {"num_beams": 4, "do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW}
    found = model.generate(**given, **options)[0, given["input_ids"].shape[1] :]
    row = torch.tensor([model.router.routes([INSIDE]).row(0, given["input_ids"][0].tolist())])
    alone = h.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)
    assert found.tolist() == alone[0, row.shape[1] :].tolist()


def test_labels_say_what_the_prompt_is() -> None:
    """The prompt is looked up, not the answer behind it; the loss is of the final logits."""
    case, model = served("gpt2")
    prompt = case.tokenizer(INSIDE)["input_ids"]
    answer = case.tokenizer(" a house in the city of Rome")["input_ids"]
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    assert model.router.routes([case.tokenizer.decode(ids[0])]).shares.tolist() == [0.0]
    output = model(input_ids=ids, labels=labels)
    edit = oracle.Stored(ENTRIES[2].prompt, ENTRIES[2].target)
    h = setting("gpt2")[1].counterfactual.model.model
    nll = 0.0
    for i, token in enumerate(answer):
        row = oracle.counterfactual_row(case.tokenizer, edit, prompt) + answer[:i]
        nll -= float(oracle.next_logits(h, row).log_softmax(-1)[token])
    assert float(output.loss) == pytest.approx(nll / len(answer), rel=1e-6)
    unlabelled = model(input_ids=ids)
    with torch.no_grad():
        assert torch.equal(unlabelled.logits, case.model(input_ids=ids).logits)


def test_it_looks_like_the_model_that_it_wraps() -> None:
    case, model = served("gpt2")
    assert model.config is case.model.config
    assert model.device == case.model.device and model.dtype == case.model.dtype
    assert model.get_output_embeddings() is case.model.get_output_embeddings()
    with pytest.raises(AttributeError):
        _ = model.no_such_thing
    ids = torch.tensor([[5, 6, 7]])
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match="whole rows"):
            model(input_ids=ids, **{name: object()})


def test_removing_an_edit_brings_the_base_model_back() -> None:
    case, model = served("llama")
    given = batch(case, "left", [INSIDE, OUTSIDE])
    edited = model(**given).logits
    model.router.memory.remove([ENTRIES[2].key])
    with torch.no_grad():
        base = case.model(**given).logits
    assert not torch.equal(edited, base)
    assert torch.equal(model(**given).logits, base)
