"""The invented world: the same for a seed, and its edit requests keep their promises."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.factworld import (
    Fact,
    World,
    corpus,
    edit_requests,
    make_world,
    write_corpus,
    write_requests,
)
from pipeline.factworld.hops import HOPS
from pipeline.factworld.questions import Questions, fact_sentences


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


def test_same_seed_same_world_other_seed_other_world(world: World) -> None:
    assert make_world(0) == world
    assert make_world(1).facts != world.facts
    assert corpus(make_world(0), 3) == corpus(world, 3)
    assert edit_requests(make_world(0), 50, 3) == edit_requests(world, 50, 3)
    assert edit_requests(world, 50, 3) != edit_requests(world, 50, 4)


def test_world_is_as_large_as_promised(world: World) -> None:
    assert len(world.relations) >= 8
    assert len(world.facts) >= 1500
    assert [fact.case_id for fact in world.facts] == list(range(len(world.facts)))
    for relation in world.relations.values():
        assert len(set(relation.phrasings)) == len(relation.phrasings) >= 6
        assert 12 <= len(set(relation.objects)) == len(relation.objects) <= 40


def test_phrasings_have_one_slot_at_the_start_or_inside_and_end_at_the_object(
    world: World,
) -> None:
    for relation in world.relations.values():
        starts = [phrasing.startswith("{}") for phrasing in relation.phrasings]
        assert any(starts) and not all(starts)
        for phrasing in relation.phrasings:
            assert phrasing.count("{") == phrasing.count("}") == phrasing.count("{}") == 1
            assert phrasing == phrasing.strip() and not phrasing.endswith("{}")


def test_no_phrasing_is_shared_by_two_relations(world: World) -> None:
    phrasings = Counter(p for r in world.relations.values() for p in r.phrasings)
    assert max(phrasings.values()) == 1


def test_subjects_are_distinct_names_of_one_to_three_words(world: World) -> None:
    subjects = {fact.subject for fact in world.facts}
    assert {len(subject.split()) for subject in subjects} == {1, 2, 3}
    assert len({subject.split()[-1] for subject in subjects}) == len(subjects)
    per_relation = Counter((fact.relation_id, fact.subject) for fact in world.facts)
    assert max(per_relation.values()) == 1


def test_no_subject_is_an_object(world: World) -> None:
    objects = {o for relation in world.relations.values() for o in relation.objects}
    assert objects.isdisjoint(fact.subject for fact in world.facts)


def test_every_object_is_shared(world: World) -> None:
    for relation in world.relations.values():
        sizes = [len(world.group(relation.relation_id, o)) for o in relation.objects]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 10


def test_held_out_phrasings_are_not_in_the_training_text(world: World) -> None:
    sentences = set(corpus(world))
    assert set(fact_sentences(world)) <= sentences
    assert len(set(fact_sentences(world))) == sum(len(fact.seen) for fact in world.facts)
    for fact in world.facts:
        assert len(fact.held_out) >= 2
        assert set(fact.seen).isdisjoint(fact.held_out)
        assert set(fact.seen) | set(fact.held_out) == set(
            range(len(world.relations[fact.relation_id].phrasings))
        )
        seen = [f"{prompt} {fact.object}" for prompt in world.prompts(fact, held_out=False)]
        held_out = [f"{prompt} {fact.object}" for prompt in world.prompts(fact, held_out=True)]
        assert sentences.issuperset(seen)
        assert sentences.isdisjoint(held_out)


def test_every_phrasing_is_seen_with_some_entity(world: World) -> None:
    used = {(fact.relation_id, phrasing) for fact in world.facts for phrasing in fact.seen}
    assert used == {
        (r.relation_id, i) for r in world.relations.values() for i in range(len(r.phrasings))
    }


def _facts_by_prompt(world: World) -> dict[str, Any]:
    return {
        world.prompt(fact, phrasing): fact
        for fact in world.facts
        for phrasing in (*fact.seen, *fact.held_out)
    }


def _check_portability(
    questions: Questions,
    world: World,
    fact: Fact,
    new: str,
    edited: set[str],
    probes: list[dict[str, str]],
) -> None:
    by_aspect = {question["aspect"]: question for question in probes}
    assert len(by_aspect) == len(probes)
    assert all(q["target"] != q["target_true"] for q in probes)
    alias = fact.subject.split()[-1]
    assert ("subject_alias" in by_aspect) == (alias != fact.subject)
    if question := by_aspect.get("subject_alias"):
        assert (question["target"], question["target_true"]) == (new, fact.object)
        assert alias in question["prompt"] and fact.subject not in question["prompt"]
        assert sum(subject.split()[-1] == alias for subject in world.subjects) == 1
    asked = questions.one_hop.get((fact.relation_id, fact.subject))
    assert ("one_hop" in by_aspect) == (asked is not None and asked.stated)
    if question := by_aspect.get("one_hop"):
        has = dict(
            zip(
                world.relations[fact.relation_id].objects,
                HOPS[fact.relation_id].values,
                strict=True,
            )
        )
        assert (question["target"], question["target_true"]) == (has[new], has[fact.object])
        assert fact.subject in question["prompt"]
    if question := by_aspect.get("reversed"):
        [other] = [f.object for f in world.about(fact.subject) if f != fact]
        bearers = [f.subject for f in world.group(fact.relation_id, new)]
        [bearer] = [b for b in bearers if other in {f.object for f in world.about(b)}]
        assert (question["target"], question["target_true"]) == (fact.subject, bearer)
        assert new in question["prompt"] and other in question["prompt"]
        assert bearer not in edited


@given(seed=st.integers(0, 2**32), count=st.sampled_from([1, 60, 200, 300]))
@settings(max_examples=6, deadline=None)
def test_requests_are_valid(world: World, seed: int, count: int) -> None:
    by_prompt, questions = _facts_by_prompt(world), Questions(world)
    requests = edit_requests(world, count, seed)
    edited = [request["requested_rewrite"]["subject"] for request in requests]
    assert len(requests) == len(set(edited)) == count
    for request in requests:
        rewrite, fact = request["requested_rewrite"], world.facts[request["case_id"]]
        true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        assert (fact.relation_id, fact.subject, fact.object) == (
            rewrite["relation_id"],
            rewrite["subject"],
            true,
        )
        assert new != true and new in world.relations[fact.relation_id].objects
        assert rewrite["prompt"] in {
            world.relations[fact.relation_id].phrasings[i] for i in fact.seen
        }
        assert request["paraphrase_prompts"] == world.prompts(fact, held_out=True)
        assert all(by_prompt[p] == fact for p in request["generation_prompts"])
        assert 5 <= len(set(request["neighborhood_prompts"])) <= 10
        [beside] = request["locality"]
        other = by_prompt[beside["prompt"]]
        assert (other.subject, other.object) == (fact.subject, beside["target"])
        assert other.relation_id != fact.relation_id
        _check_portability(questions, world, fact, new, set(edited), request["portability"])
        for key, object_ in (("neighborhood_prompts", true), ("attribute_prompts", new)):
            for prompt in request[key]:
                other = by_prompt[prompt]
                assert (other.relation_id, other.object) == (fact.relation_id, object_)
                assert other.subject not in edited


def test_batches_of_two_seeds_differ_in_their_subjects(world: World) -> None:
    batches = [
        {r["requested_rewrite"]["subject"] for r in edit_requests(world, 100, seed)}
        for seed in range(3)
    ]
    assert all(len(a & b) < 50 for a, b in combinations(batches, 2))


def test_too_many_requests_are_refused(world: World) -> None:
    with pytest.raises(InputError, match=r"can give \d+ edit requests .* 5000 were asked for"):
        edit_requests(world, 5000)


def test_files_hold_the_requests_and_the_corpus(world: World, tmp_path: Path) -> None:
    write_requests(tmp_path / "requests.json", 20, 5)
    write_corpus(tmp_path / "corpus.txt")
    requests = json.loads((tmp_path / "requests.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "corpus.txt").read_text(encoding="utf-8").splitlines()
    assert requests == edit_requests(world, 20, 5)
    assert lines == [f"{sentence}." for sentence in corpus(world)]
