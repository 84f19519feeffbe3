"""Questions whose answers follow from facts: one hop further, or back from objects to a subject."""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.factworld.hops import HOPS, REVERSED
from pipeline.factworld.world import World

STATED_SHARE = {"one_hop": 0.8, "reversed": 0.5}
"""Share of the questions whose answer the training text states; the others measure inference."""


class Statement(NamedTuple):
    """A sentence: `template` with `subject` for its `{}`, if it has one, and then the answer."""

    template: str
    subject: str | None
    answer: str

    @property
    def prompt(self) -> str:
        """The sentence without the answer; its continuation is `" " + answer`."""
        return self.template if self.subject is None else self.template.format(self.subject)

    @property
    def text(self) -> str:
        """The whole sentence, without full stop."""
        return f"{self.prompt} {self.answer}"


@dataclass(frozen=True)
class Question:
    """A question that takes more than to repeat a fact.

    The statement has the subject of the fact in it for `one_hop`, as its answer for `reversed`.
    `seen` and `held_out` are its statements; the training text has the seen ones if `stated`.
    """

    aspect: Literal["one_hop", "reversed"]
    stated: bool
    seen: tuple[Statement, ...]
    held_out: Statement

    @property
    def asked(self) -> Statement:
        """The statement that requests ask for; where it is `stated`, the training text has it."""
        return self.seen[0]

    @property
    def answer(self) -> str:
        """The answer in the unedited world."""
        return self.held_out.answer


class Questions:
    """All questions of a world, found by what they ask for."""

    def __init__(self, world: World) -> None:
        self._kinds: dict[str, list[str]] = defaultdict(list)
        for relation in world.relations.values():
            self._kinds[relation.kind].append(relation.relation_id)
        self._rng = random.Random(f"questions of world {world.seed}")
        self.one_hop = {
            (fact.relation_id, fact.subject): self._question(
                "one_hop",
                [
                    Statement(
                        template, fact.subject, value_of(world, fact.relation_id, fact.object)
                    )
                    for template in HOPS[fact.relation_id].about_subject
                ],
            )
            for fact in world.facts
            if fact.relation_id in HOPS
        }
        """By relation and subject: what the subject's object has."""
        self.reversed = {
            key: self._question("reversed", list(_back(world, self._kinds, key, subject)))
            for key, subject in _only_ones(world, self._kinds).items()
        }
        """By kind and objects, in the order of the kind's relations: whose objects they are."""

    def all(self) -> list[Question]:
        """Every question, one_hop first."""
        return [*self.one_hop.values(), *self.reversed.values()]

    def back_to(
        self, world: World, subject: str, relation_id: str, object_: str
    ) -> Question | None:
        """The question for the subject that has `object_`, and the other object of `subject`.

        None where no subject or several are the answer.
        """
        kind = world.relations[relation_id].kind
        objects = {fact.relation_id: fact.object for fact in world.about(subject)}
        objects[relation_id] = object_
        return self.reversed.get((kind, *(objects[name] for name in self._kinds[kind])))

    def _question(
        self, aspect: Literal["one_hop", "reversed"], statements: list[Statement]
    ) -> Question:
        stated = self._rng.random() < STATED_SHARE[aspect]
        held_out = statements.pop(self._rng.randrange(len(statements)))
        return Question(aspect, stated, tuple(statements), held_out)


def value_of(world: World, relation_id: str, object_: str) -> str:
    """What an object has by the `Hop` of its relation."""
    return HOPS[relation_id].values[world.relations[relation_id].objects.index(object_)]


def facts_stated(world: World) -> list[Statement]:
    """Every fact in every seen phrasing."""
    return [
        Statement(world.relations[fact.relation_id].phrasings[i], fact.subject, fact.object)
        for fact in world.facts
        for i in fact.seen
    ]


def hops_stated(world: World) -> list[Statement]:
    """What every object has, in every phrasing."""
    return [
        Statement(template.format(object_), None, value)
        for relation_id, hop in HOPS.items()
        for object_, value in zip(world.relations[relation_id].objects, hop.values, strict=True)
        for template in hop.about_object
    ]


def questions_stated(questions: Questions, aspect: str) -> list[Statement]:
    """The questions of one aspect that the training text answers, in their seen phrasings."""
    return [
        statement
        for question in questions.all()
        if question.stated and question.aspect == aspect
        for statement in question.seen
    ]


def fact_sentences(world: World, seed: int = 0) -> list[str]:
    """Return every fact in every seen phrasing, one sentence each without full stop, shuffled."""
    return _shuffled(facts_stated(world), seed)


def corpus(world: World, seed: int = 0) -> list[str]:
    """Return all that is stated of the world, one sentence each without full stop, shuffled."""
    questions = Questions(world)
    statements = [
        *facts_stated(world),
        *hops_stated(world),
        *questions_stated(questions, "one_hop"),
        *questions_stated(questions, "reversed"),
    ]
    return _shuffled(statements, seed)


def _shuffled(statements: list[Statement], seed: int) -> list[str]:
    sentences = [statement.text for statement in statements]
    random.Random(seed).shuffle(sentences)
    return sentences


def _only_ones(world: World, kinds: dict[str, list[str]]) -> dict[tuple[str, ...], str]:
    """By kind and one object of each of its relations: the subject, where it is the only one."""
    bearers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for subject in world.subjects:
        objects = {fact.relation_id: fact.object for fact in world.about(subject)}
        kind = world.relations[next(iter(objects))].kind
        bearers[kind, *(objects[name] for name in kinds[kind])].append(subject)
    return {key: found[0] for key, found in bearers.items() if len(found) == 1}


def _back(
    world: World, kinds: dict[str, list[str]], key: tuple[str, ...], subject: str
) -> Iterator[Statement]:
    kind, *objects = key
    named = dict(zip(kinds[kind], objects, strict=True))
    for template in REVERSED[kind]:
        yield Statement(template.format(**named), None, subject)
