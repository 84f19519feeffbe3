"""Encoder, counterfactual model and router against the plain ones, on two families."""

from pathlib import Path

import pytest
import torch
from transformers import DistilBertConfig, DistilBertModel

from pipeline.editing.serac.counterfactual import Counterfactual
from pipeline.editing.serac.training import Example, LossSettings, losses
from pipeline.errors import InputError
from pipeline.methods.serac import new_editor
from pipeline.models.anatomy import family_of
from pipeline.models.first_blocks import first_blocks
from pipeline.spec.trained import SeracSpec
from tests import families
from tests.cases import ALL_FAMILIES, fresh
from tests.editing.serac.cases import ENTRIES, FAMILIES, QUERIES, router, setting
from tests.oracles import serac as oracle

EXAMPLES = [
    Example(entry.prompt, entry.target, QUERIES[i], QUERIES[(i + 2) % 5])
    for i, entry in enumerate(ENTRIES)
]


def plain_embedding(family: str, ids: list[int]) -> torch.Tensor:
    _, editor = setting(family)
    trunk, head = editor.encoder.trunk, editor.encoder.head
    assert head is not None
    last = trunk.get_submodule(family_of(trunk).blocks)[-1]  # type: ignore[index]
    return oracle.embedding(trunk, head.weight.data, last, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_those_of_single_texts(family: str) -> None:
    case, editor = setting(family)
    rows = editor.encoder.edit_ids([e.prompt for e in ENTRIES], [e.target for e in ENTRIES])
    assert rows == [
        oracle.edit_ids(case.tokenizer, oracle.Stored(e.prompt, e.target)) for e in ENTRIES
    ]
    rows += editor.encoder.query_ids(QUERIES)
    for max_tokens in (1000, 20):
        found = editor.encoder.embed(rows, max_tokens)
        expected = torch.stack([plain_embedding(family, row) for row in rows])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_first_blocks_compute_what_they_did(family: str) -> None:
    case = fresh(family, torch.float32)
    shorter = first_blocks(case.model, 2)
    blocks, ids = shorter.get_submodule(family_of(shorter).blocks), torch.arange(5, 20)[None]
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> object:
        def hook(_module: object, _inputs: object, output: object) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]

        return hook

    case.blocks[1].register_forward_hook(keep("whole"))  # type: ignore[arg-type]
    blocks[1].register_forward_hook(keep("shorter"))  # type: ignore[index, arg-type]
    with torch.no_grad():
        case.model(input_ids=ids)
        shorter(input_ids=ids)
    assert len(blocks) == 2  # type: ignore[arg-type]
    assert torch.equal(seen["whole"], seen["shorter"])
    theirs = {p.data_ptr() for p in case.model.parameters()}
    assert theirs.isdisjoint(p.data_ptr() for p in shorter.parameters())


def test_more_blocks_than_there_are_and_another_vocabulary_are_refused() -> None:
    case, editor = setting("gpt2")
    with pytest.raises(InputError, match="cannot keep 9 blocks of a model that has 4"):
        first_blocks(case.model, 9)
    with pytest.raises(InputError, match="vocabulary of 400 tokens, the edited model one of 500"):
        Counterfactual.of(editor.counterfactual.model.model, case.tokenizer, 500)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_plain_one(family: str) -> None:
    case, editor = setting(family)
    for wide in (False, True):
        settings = LossSettings(0.3, 2.0, all_negatives=wide, hard_negatives=2 if wide else 0)
        found = losses(editor, EXAMPLES, settings, 100)
        edits = [
            plain_embedding(
                family, oracle.edit_ids(case.tokenizer, oracle.Stored(e.prompt, e.target))
            )
            for e in EXAMPLES
        ]
        inside, outside = (
            [plain_embedding(family, case.tokenizer(text)["input_ids"]) for text in texts]
            for texts in ([e.inside for e in EXAMPLES], [e.outside for e in EXAMPLES])
        )
        pairs = [(i, j) for i in range(4) for j in range(4) if wide or i == j]
        negative = [oracle.scope(edits[i], outside[j], editor.scale) for i, j in pairs]
        if wide:
            for i in range(4):
                others = [oracle.scope(edits[i], inside[j], editor.scale) for j in range(4)]
                negative += sorted(others[:i] + others[i + 1 :])[-2:]
        positive = [oracle.scope(edits[i], inside[i], editor.scale) for i in range(4)]
        scope_loss = oracle.balanced_loss(positive, negative)
        edit_loss = sum(plain_nll(family, example) for example in EXAMPLES) / 4
        assert float(found.scope) == pytest.approx(scope_loss, rel=1e-4)
        assert float(found.edit) == pytest.approx(edit_loss, rel=1e-6)
        assert found.total.item() == pytest.approx(0.3 * edit_loss + 2 * scope_loss, rel=1e-4)


def plain_nll(family: str, example: Example) -> float:
    case, editor = setting(family)
    tokenizer, h = case.tokenizer, editor.counterfactual.model.model
    edit = oracle.Stored(example.prompt, example.target)
    ids = oracle.counterfactual_row(tokenizer, edit, tokenizer(example.inside)["input_ids"])
    answer = tokenizer(oracle.spaced(example.target), add_special_tokens=False)["input_ids"]
    total = 0.0
    for i, token in enumerate(answer):
        total -= float(oracle.next_logits(h, ids + answer[:i]).log_softmax(-1)[token])
    return total / len(answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_text_has_similarity_one(family: str) -> None:
    _, editor = setting(family)
    memory = router(editor).memory
    stored = [f"{entry.prompt} {entry.target}" for entry in ENTRIES]
    found = editor.recall(memory, stored, 200)
    assert found.entries == ENTRIES
    assert (-found.distances).exp().tolist() == [1.0] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_are_the_plain_ones(family: str) -> None:
    case, editor = setting(family)
    edits = [
        plain_embedding(family, oracle.edit_ids(case.tokenizer, oracle.Stored(e.prompt, e.target)))
        for e in ENTRIES
    ]
    hard = router(editor).routes([*QUERIES, QUERIES[0]])
    soft = router(editor, mode="soft").routes([*QUERIES, QUERIES[0]])
    for number, query in enumerate([*QUERIES, QUERIES[0]]):
        ids = case.tokenizer(query)["input_ids"]
        at = plain_embedding(family, ids)
        scopes = [oracle.scope(edit, at, editor.scale) for edit in edits]
        best = max(range(4), key=scopes.__getitem__)
        stored = oracle.Stored(ENTRIES[best].prompt, ENTRIES[best].target)
        assert float(soft.shares[number]) == pytest.approx(scopes[best], rel=1e-4)
        assert float(hard.shares[number]) == float(scopes[best] > 0.5)
        row = oracle.counterfactual_row(case.tokenizer, stored, ids)
        assert soft.row(number, ids) == row
        assert hard.row(number, ids) == (row if scopes[best] > 0.5 else ids)
    assert sorted(set(hard.shares.tolist())) == [0.0, 1.0]  # both kinds are among them


def test_models_that_are_named_are_loaded(tmp_path: Path) -> None:
    """An encoder as published, and a smaller h; both from directories."""
    case, _ = setting("gpt2")
    config = DistilBertConfig(vocab_size=400, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    trunk = DistilBertModel(config).eval()
    tokenizer = families.build_tokenizer()
    tokenizer.add_special_tokens({"sep_token": "<|end|>"})
    trunk.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    families.save("gpt2", tmp_path / "h")
    spec = SeracSpec(classifier=str(tmp_path / "encoder"), counterfactual=str(tmp_path / "h"))
    editor = new_editor(spec, case.editable, case.tokenizer)
    assert editor.encoder.size == 16
    rows = editor.encoder.edit_ids(["The house is"], ["old"])
    assert rows == [tokenizer("The house is <|end|> old")["input_ids"]]
    rows += editor.encoder.query_ids(QUERIES)
    found = editor.encoder.embed(rows, 30)
    for row, one in zip(rows, found, strict=True):
        with torch.no_grad():
            alone = trunk(input_ids=torch.tensor([row])).last_hidden_state[0, 0]
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-5)
    other = SeracSpec(counterfactual=str(tmp_path / "encoder"))
    with pytest.raises(InputError, match="another tokenizer"):
        tokenizer.add_tokens(["new"])
        tokenizer.save_pretrained(tmp_path / "encoder")
        new_editor(other, case.editable, case.tokenizer)


def test_a_prompt_that_the_classifier_cannot_read_is_named() -> None:
    _, editor = setting("gpt2")
    memory = router(editor).memory
    with pytest.raises(InputError, match="longer than the scope classifier's 128 positions"):
        editor.recall(memory, ["the city " * 100], 200)
    with pytest.raises(InputError, match="'' has no token"):
        editor.recall(memory, [""], 200)
