"""A deterministic invented world: entities and facts."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.factworld.relations import RELATIONS, Relation

NUM_HELD_OUT = 2

_ONSETS = [
    *("b", "br", "c", "d", "dr", "f", "g", "gl", "h", "j", "k", "l", "m", "n"),
    *("p", "pr", "r", "s", "st", "t", "tr", "v", "w", "y", "z", "th", "sh"),
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ou"]
_CODAS = ["", "l", "n", "r", "s", "x", "nd", "rk", "m", "th"]
_SUFFIXES: dict[str, tuple[str, ...]] = {
    "town": ("", "", "wick", "stead", "ford", "by"),
    "plant": ("", "wort", "bane", "leaf"),
}


@dataclass(frozen=True)
class Fact:
    """One fact: `subject` has `object` under `relation_id`.

    `seen` and `held_out` are indices into the relation's phrasings: the training text states the
    fact in the seen ones only.
    """

    case_id: int
    relation_id: str
    subject: str
    object: str
    seen: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True)
class World:
    """All facts of one seed, and the relations that phrase them."""

    seed: int
    relations: dict[str, Relation]
    facts: tuple[Fact, ...]
    _groups: dict[tuple[str, str], list[Fact]] = field(default_factory=dict, repr=False)
    _subjects: dict[str, list[Fact]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for fact in self.facts:
            self._groups.setdefault((fact.relation_id, fact.object), []).append(fact)
            self._subjects.setdefault(fact.subject, []).append(fact)

    @property
    def subjects(self) -> list[str]:
        """All subjects, in the order of their first fact."""
        return list(dict.fromkeys(fact.subject for fact in self.facts))

    def group(self, relation_id: str, object_: str) -> list[Fact]:
        """Return the facts of one relation with one object, in the order of their case ids."""
        return self._groups.get((relation_id, object_), [])

    def about(self, subject: str) -> list[Fact]:
        """Return the facts of a subject, in the order of their case ids."""
        return self._subjects.get(subject, [])

    def prompt(self, fact: Fact, phrasing: int) -> str:
        """Return the prompt of a fact in one phrasing; its continuation is `" " + object`."""
        return self.relations[fact.relation_id].phrasings[phrasing].format(fact.subject)

    def prompts(self, fact: Fact, *, held_out: bool) -> list[str]:
        """Return the fact's prompts in its held-out phrasings, or in its seen ones."""
        return [self.prompt(fact, i) for i in (fact.held_out if held_out else fact.seen)]


def make_world(seed: int = 0, *, entities_per_kind: int = 170) -> World:
    """Make the world of `seed`; every entity has one fact in each relation of its kind."""
    rng = random.Random(seed)
    subjects = _name_entities(rng, entities_per_kind)
    facts: list[Fact] = []
    for relation in RELATIONS:
        names = subjects[relation.kind]
        objects = [relation.objects[i % len(relation.objects)] for i in range(len(names))]
        rng.shuffle(objects)
        for name, object_ in zip(names, objects, strict=True):
            order = rng.sample(range(len(relation.phrasings)), len(relation.phrasings))
            held_out, seen = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:]
            facts.append(
                Fact(len(facts), relation.relation_id, name, object_, tuple(seen), tuple(held_out))
            )
    return World(seed, {r.relation_id: r for r in RELATIONS}, tuple(facts))


def _name_entities(rng: random.Random, count: int) -> dict[str, list[str]]:
    """Invent `count` names of 1-3 words for each kind; no last word is used twice."""
    words = _words(rng)
    shared = [next(words) for _ in range(60)]
    kinds = list(dict.fromkeys(relation.kind for relation in RELATIONS))
    return {kind: [_name(kind, words, shared, rng) for _ in range(count)] for kind in kinds}


def _name(kind: str, words: Iterator[str], shared: list[str], rng: random.Random) -> str:
    last = next(words) + rng.choice(_SUFFIXES.get(kind, ("",)))
    first = rng.choice(shared)
    match kind:
        case "person":
            return f"{first} {last}" if rng.random() < 0.8 else f"{first} van {last}"
        case "company":
            return f"{next(words)} and {last}" if rng.random() < 0.3 else f"{first} {last}"
        case "ship" | "plant":
            return f"{first} {last}" if rng.random() < 0.5 else last
        case "book":
            return f"{first} of {last}" if rng.random() < 0.5 else f"{first} {last}"
        case _:
            return last


def _words(rng: random.Random) -> Iterator[str]:
    """Yield invented capitalised words of two or three syllables, never one twice."""
    used: set[str] = set()
    while True:
        syllables = [
            rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 2, 3)))
        ]
        word = ("".join(syllables) + rng.choice(_CODAS)).capitalize()
        if word not in used:
            used.add(word)
            yield word
