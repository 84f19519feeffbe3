"""Which neurons are edited, and that nothing else is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.editing.attribution import Attributions
from pipeline.editing.knowledge_neurons import (
    Candidate,
    Candidates,
    Neuron,
    NeuronEdit,
    NeuronSettings,
    find_candidates,
    neuron_update,
    refine,
    sharing_facts,
)
from pipeline.editing.update import EditedWeights
from tests.cases import draw, fresh, relative_error
from tests.fuzzing import fuzz
from tests.oracles import knowledge_neurons as oracle

UPDATE = NeuronSettings("update", "value_norm", 1.0, 8.0)
EDITS = [NeuronEdit((3, 7), (5,), (6, 9)), NeuronEdit((7, 60), (11, 2), (8,))]


def _candidates(agreeing: list[int], prompts: int) -> Candidates:
    found = [Candidate(Neuron(0, i), 0.1, count) for i, count in enumerate(agreeing) if count]
    return Candidates(tuple(found), prompts, (1,))


def test_neurons_above_the_threshold_of_their_prompt() -> None:
    scores = torch.zeros(3, 2, 4)
    scores[0, 0, 1], scores[0, 1, 3] = 1.0, 0.3
    scores[1, 1, 3], scores[1, 0, 2] = 0.01, 0.0019
    scores[2, 0, 0] = -5.0  # a prompt without a positive attribution names none
    found = find_candidates(Attributions(scores, (7, 8)), (2, 5), 0.2)
    assert [(c.neuron, c.agreeing) for c in found.neurons] == [
        (Neuron(2, 1), 1),
        (Neuron(5, 3), 2),
    ]
    assert found.neurons[1].attribution == pytest.approx(0.31 / 3)
    assert found.prompts == 3 and found.answer == (7, 8)


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    [
        ([10, 8, 7, 3], [0, 1, 2]),  # as many as wanted agree at once
        ([10, 5, 1, 1], [0, 1]),  # lowered from 0.7 to 0.5
        ([10, 9, 9, 8, 8, 8, 7], [0, 1, 2]),  # raised from 0.7 to 0.85
        ([10] * 7, [*range(7)]),  # all agree on more: they stay
        ([9] * 7, [*range(7)]),  # none would be left
        ([10] + [6] * 9, [0]),  # from too few to too many
        ([4] * 9, [*range(9)]),  # from none to too many
        ([1], [0]),
    ],
)
def test_the_share_is_adapted(agreeing: list[int], expected: list[int]) -> None:
    chosen = refine(_candidates(agreeing, 10), 0.7, 2, 5)
    assert [candidate.neuron.number for candidate in chosen] == expected


@fuzz(100, 1500)
@given(st.lists(st.lists(st.floats(-1, 1), min_size=12, max_size=12), min_size=1, max_size=7))
def test_what_prompts_agree_on_is_what_plain_counting_finds(prompts: list[list[float]]) -> None:
    scores = torch.tensor(prompts, dtype=torch.float64).view(-1, 2, 6)
    found = find_candidates(Attributions(scores, (1,)), (0, 1), 0.2)
    chosen = [tuple(candidate.neuron) for candidate in refine(found, 0.7, 2, 5)]
    assert chosen == oracle.agreed(list(scores), 0.2, 0.7, 2, 5)


def test_who_else_of_a_relation_has_a_neuron() -> None:
    a, b, c = (Neuron(0, number) for number in range(3))
    shares = sharing_facts([[a, b], [a], [b, c], [a], [c]], ["P1", "P1", "P1", None, "P2"])
    assert shares == [{a: 0.5, b: 0.5}, {a: 0.5}, {b: 0.5, c: 0.0}, {a: 0.0}, {c: 0.0}]


def test_an_update_exchanges_the_answers_in_its_neurons_alone() -> None:
    weight, embeddings = draw(32, 64), draw(20, 32, seed=1)
    found = neuron_update(weight, embeddings, EDITS, UPDATE)
    assert found.parts["left"].shape == (32, 3) and found.parts["right"].shape == (3, 64)
    expected = torch.zeros_like(weight)
    for edit in EDITS:
        columns = weight.T[list(edit.numbers)]
        change = oracle.exchanged(columns, embeddings, edit.old, edit.new, (1.0, 8.0))
        expected[:, list(edit.numbers)] += change.T
    assert relative_error(found.matrix(), expected) < 1e-6
    changed = found.matrix().abs().sum(dim=0).nonzero().flatten().tolist()
    assert changed == [3, 7, 60]


def test_without_scaling_embeddings_are_taken_as_they_are() -> None:
    weight, embeddings = draw(32, 64), draw(20, 32, seed=1)
    settings = NeuronSettings("update", "none", 2.0, 3.0)
    found = neuron_update(weight, embeddings, EDITS[:1], settings).matrix()
    expected = 3 * embeddings[[6, 9]].mean(0) - 2 * embeddings[5]
    assert relative_error(found[:, 3], expected) < 1e-6
    assert relative_error(found[:, 7], expected) < 1e-6


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_erased_neurons_are_zero_and_restored_to_the_bit(family: str) -> None:
    tiny = fresh(family, torch.float32)
    weights = EditedWeights(tiny.editable, (1,))
    before = tiny.editable.oriented_weight(1).clone()
    erase = NeuronSettings("erase", "value_norm", 1.0, 8.0)
    embeddings = tiny.editable.output_embeddings
    update = neuron_update(weights.masters(1)[0], embeddings, EDITS, erase)
    weights.apply(1, update.matrix())
    after = tiny.editable.oriented_weight(1)
    assert not after[:, [3, 7, 60]].any()
    others = [number for number in range(64) if number not in (3, 7, 60)]
    assert torch.equal(after[:, others], before[:, others])
    weights.revert()
    assert torch.equal(tiny.editable.oriented_weight(1).view(torch.int32), before.view(torch.int32))


def test_enhancing_doubles_once_however_many_facts_ask() -> None:
    weight = draw(32, 64)
    enhance = NeuronSettings("enhance", "value_norm", 1.0, 8.0)
    found = neuron_update(weight, draw(20, 32), EDITS, enhance).matrix()
    assert torch.equal(found[:, [3, 7, 60]], weight[:, [3, 7, 60]].float())


def test_without_a_neuron_an_update_is_empty() -> None:
    found = neuron_update(draw(32, 64), draw(20, 32), [], UPDATE)
    assert found.parts["left"].shape == (32, 0) and found.norm() == 0.0
    assert found.matrix().shape == (32, 64)
