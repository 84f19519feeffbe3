"""One-hop and reversed questions: their answers follow from the facts, and some are kept back."""

from collections import defaultdict
from string import Formatter

import pytest

from pipeline.factworld import World, corpus, make_world
from pipeline.factworld.hops import HOPS, REVERSED
from pipeline.factworld.questions import STATED_SHARE, Questions, value_of


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.fixture(scope="module")
def questions(world: World) -> Questions:
    return Questions(world)


def test_every_object_of_a_hop_has_a_value_of_its_own(world: World) -> None:
    values = [value for hop in HOPS.values() for value in hop.values]
    assert len(set(values)) == len(values)
    kinds = {world.relations[relation_id].kind for relation_id in HOPS}
    assert kinds == {relation.kind for relation in world.relations.values()}
    for relation_id, hop in HOPS.items():
        assert len(hop.values) == len(world.relations[relation_id].objects)
    names = {word for subject in world.subjects for word in subject.split()}
    objects = {o for relation in world.relations.values() for o in relation.objects}
    assert names.isdisjoint(values) and objects.isdisjoint(values)


def test_phrasings_have_their_slots_and_end_at_the_answer(world: World) -> None:
    facts = {p for relation in world.relations.values() for p in relation.phrasings}
    for hop in HOPS.values():
        for phrasing in (*hop.about_object, *hop.about_subject):
            assert phrasing.count("{}") == 1 and phrasing == phrasing.strip()
            assert not phrasing.endswith("{}") and phrasing not in facts
    for kind, phrasings in REVERSED.items():
        relations = {r.relation_id for r in world.relations.values() if r.kind == kind}
        assert len(set(phrasings)) == len(phrasings) >= 3
        for phrasing in phrasings:
            assert {name for _, name, _, _ in Formatter().parse(phrasing) if name} == relations


def test_one_hop_answers_are_what_the_object_has(world: World, questions: Questions) -> None:
    for (relation_id, subject), question in questions.one_hop.items():
        [fact] = [f for f in world.about(subject) if f.relation_id == relation_id]
        statements = (*question.seen, question.held_out)
        assert {s.answer for s in statements} == {value_of(world, relation_id, fact.object)}
        assert {s.subject for s in statements} == {subject}
        assert {s.template for s in statements} == set(HOPS[relation_id].about_subject)


def test_a_reversed_question_has_one_answer(world: World, questions: Questions) -> None:
    assert len(questions.reversed) > 300
    bearers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for subject in world.subjects:
        bearers[tuple(fact.object for fact in world.about(subject))].append(subject)
    for (_, *objects), question in questions.reversed.items():
        assert [question.answer] == bearers[tuple(objects)]
        assert all(o in s.prompt for s in (*question.seen, question.held_out) for o in objects)


def test_back_to_is_the_question_with_another_object(world: World, questions: Questions) -> None:
    fact = world.facts[0]
    [other] = [f.object for f in world.about(fact.subject) if f != fact]
    found = {}
    for object_ in world.relations[fact.relation_id].objects:
        bearers = [
            f.subject
            for f in world.group(fact.relation_id, object_)
            if other in {g.object for g in world.about(f.subject)}
        ]
        question = questions.back_to(world, fact.subject, fact.relation_id, object_)
        assert (question and question.answer) == (bearers[0] if len(bearers) == 1 else None)
        found[object_] = question
    assert any(found.values()) and not all(found.values())


def test_held_out_questions_are_not_in_the_training_text(
    world: World, questions: Questions
) -> None:
    sentences = set(corpus(world))
    for question in questions.all():
        seen = {statement.text for statement in question.seen}
        assert seen <= sentences if question.stated else seen.isdisjoint(sentences)
        assert question.held_out.text not in sentences
    for aspect, share in STATED_SHARE.items():
        stated = [q.stated for q in questions.all() if q.aspect == aspect]
        assert sum(stated) == pytest.approx(share * len(stated), rel=0.1)


def test_questions_belong_to_their_world(world: World, questions: Questions) -> None:
    assert Questions(make_world(0)).all() == questions.all()
    assert Questions(make_world(1)).all() != questions.all()
