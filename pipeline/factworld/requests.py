"""Counterfactual edit requests about a world, with probes whose right answers are known."""

import random
from collections import defaultdict
from typing import Any

from pipeline.errors import InputError
from pipeline.factworld.questions import Questions, value_of
from pipeline.factworld.world import Fact, World

MIN_NEIGHBORS = 5
MAX_NEIGHBORS = 10

_Probe = dict[str, str]


def edit_requests(world: World, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return `count` counterfactual edit requests in the CounterFact schema.

    Each subject is edited at most once, and no neighbour of a request is the subject of another.

    Raises:
        InputError: the world has not enough facts to leave every request its neighbours.
    """
    rng = random.Random(seed)
    facts = _choose_facts(world, count, rng)
    edited = {fact.subject for fact in facts}
    questions = Questions(world)
    return [_request(world, questions, fact, edited, rng) for fact in facts]


def _choose_facts(world: World, count: int, rng: random.Random) -> list[Fact]:
    facts_of: dict[str, list[Fact]] = defaultdict(list)
    for fact in world.facts:
        facts_of[fact.subject].append(fact)
    unedited = {
        (f.relation_id, f.object): len(world.group(f.relation_id, f.object)) for f in world.facts
    }
    chosen: list[Fact] = []
    taken: set[str] = set()
    for fact in rng.sample(world.facts, len(world.facts)):
        # An edited subject is lost as a neighbour for all of its facts, not for this one only.
        groups = [(f.relation_id, f.object) for f in facts_of[fact.subject]]
        if len(chosen) == count:
            break
        if fact.subject in taken or any(unedited[g] <= MIN_NEIGHBORS for g in groups):
            continue
        for g in groups:
            unedited[g] -= 1
        taken.add(fact.subject)
        chosen.append(fact)
    if len(chosen) < count:
        raise InputError(
            f"the world can give {len(chosen)} edit requests with {MIN_NEIGHBORS} neighbours "
            f"each, {count} were asked for; ask for fewer or make a larger world"
        )
    return chosen


def _request(
    world: World, questions: Questions, fact: Fact, edited: set[str], rng: random.Random
) -> dict[str, Any]:
    relation = world.relations[fact.relation_id]
    new = rng.choice([o for o in relation.objects if o != fact.object])
    neighbors = [f for f in world.group(fact.relation_id, fact.object) if f.subject not in edited]
    bearers = [f for f in world.group(fact.relation_id, new) if f.subject not in edited]
    return {
        "case_id": fact.case_id,
        "requested_rewrite": {
            "prompt": relation.phrasings[fact.seen[0]],
            "relation_id": fact.relation_id,
            "target_new": {"str": new},
            "target_true": {"str": fact.object},
            "subject": fact.subject,
        },
        "paraphrase_prompts": world.prompts(fact, held_out=True),
        "neighborhood_prompts": _sample_prompts(world, neighbors, rng),
        "attribute_prompts": _sample_prompts(world, bearers, rng),
        "generation_prompts": [world.prompt(fact, i) for i in fact.seen[1:4]],
        "locality": _other_facts(world, fact),
        "portability": [
            *_by_alias(world, fact, new),
            *_one_hop(world, questions, fact, new),
            *_reversed(world, questions, fact, new, edited),
        ],
    }


def _other_facts(world: World, fact: Fact) -> list[_Probe]:
    """The subject's facts in its other relations, which the edit shall leave alone."""
    return [
        {"prompt": world.prompt(f, f.seen[0]), "target": f.object, "aspect": "same_subject"}
        for f in world.about(fact.subject)
        if f.relation_id != fact.relation_id
    ]


def _by_alias(world: World, fact: Fact, new: str) -> list[_Probe]:
    """The edited fact asked by the last word of a subject's name, which is its alone."""
    alias = fact.subject.split()[-1]
    if alias == fact.subject:
        return []
    phrasing = world.relations[fact.relation_id].phrasings[fact.held_out[0]]
    return [_probe(phrasing.format(alias), new, fact.object, "subject_alias")]


def _one_hop(world: World, questions: Questions, fact: Fact, new: str) -> list[_Probe]:
    """What the new object has, asked of the subject, where objects of the relation have facts.

    Only questions that the training text answers: the model infers the others less often.
    """
    asked = questions.one_hop.get((fact.relation_id, fact.subject))
    if asked is None or not asked.stated:
        return []
    target = value_of(world, fact.relation_id, new)
    return [_probe(asked.asked.prompt, target, asked.answer, asked.aspect)]


def _reversed(
    world: World, questions: Questions, fact: Fact, new: str, edited: set[str]
) -> list[_Probe]:
    """Whose objects the new one and the subject's other one are, where one subject has them now.

    Only questions that the training text answers, for the model infers no other (the reversal
    curse), and whose present answer is not edited itself.
    """
    asked = questions.back_to(world, fact.subject, fact.relation_id, new)
    if asked is None or not asked.stated or asked.answer in edited:
        return []
    return [_probe(asked.asked.prompt, fact.subject, asked.answer, asked.aspect)]


def _probe(prompt: str, target: str, target_true: str, aspect: str) -> _Probe:
    return {"prompt": prompt, "target": target, "target_true": target_true, "aspect": aspect}


def _sample_prompts(world: World, facts: list[Fact], rng: random.Random) -> list[str]:
    sample = rng.sample(facts, min(MAX_NEIGHBORS, len(facts)))
    return [world.prompt(f, rng.choice(f.seen)) for f in sample]
