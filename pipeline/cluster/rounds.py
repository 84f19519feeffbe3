"""Rounds: which requests are edited in which, and what is scored after which.

All of it follows from the requests and the spec, and is the same when a run is resumed.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.cluster.shards import Shard
from pipeline.errors import InputError
from pipeline.evaluation.probes import Probe, probes_of
from pipeline.requests import EditRequest
from pipeline.spec import JobSpec, RoundsSpec
from pipeline.spec.rounds import Scored

BASELINE_ROUND = -1
"""`round` of the scores of the unedited model."""
UNTOUCHED = -1
"""`edit_round` of a fact that no round edits."""


@dataclass(frozen=True)
class Rounds:
    """The rounds of a job; a batch job has one.

    Attributes:
        shards: for each round, its requests, cut.
        evaluated: rounds after which something is scored, ascending.
        kinds: probes of an edit that are scored.
        scored: whose probes.
        followed: case_ids of the past edits that are scored; None for all.
        untouched: facts that no round edits, to be scored beside the edits.
    """

    shards: tuple[list[Shard], ...]
    evaluated: tuple[int, ...]
    kinds: tuple[str, ...]
    scored: tuple[Scored, ...] = ("current",)
    followed: frozenset[str] | None = None
    untouched: tuple[EditRequest, ...] = ()

    @cached_property
    def edit_round(self) -> dict[str, int]:
        """case_id -> the round of its edit, `UNTOUCHED` for a fact that is only scored."""
        untouched = dict.fromkeys((request.case_id for request in self.untouched), UNTOUCHED)
        return untouched | {
            request.case_id: round
            for round in range(len(self.shards))
            for request in self.requests(round)
        }

    def requests(self, round: int) -> list[EditRequest]:
        """The requests of a round, in the order of its shards."""
        return [request for shard in self.shards[round] for request in shard.items]

    def probes(self, round: int) -> list[Probe]:
        """What is scored after a round; before the first one, all that will be scored later.

        A fact that stays untouched is asked as a neighbour is: its true object should win.
        """
        if not self.kinds or not self.evaluated:
            return []
        if round != BASELINE_ROUND and round not in self.evaluated:
            return []
        reached = len(self.shards) if round == BASELINE_ROUND else round + 1
        found = [
            probe
            for edit_round in range(reached)
            for request in self.requests(edit_round)
            if self._is_scored(request, edit_round, round)
            for probe in probes_of(request, self.kinds)
        ]
        return found + [
            Probe(fact.case_id, "neighborhood", 0, fact.text, fact.target_new, fact.target_true)
            for fact in self.untouched
        ]

    def _is_scored(self, request: EditRequest, edit_round: int, round: int) -> bool:
        baseline = round == BASELINE_ROUND
        if "current" in self.scored and (
            edit_round in self.evaluated if baseline else edit_round == round
        ):
            return True
        last = self.evaluated[-1] if baseline else round
        is_past = "all_past" in self.scored and edit_round < last
        return is_past and (self.followed is None or request.case_id in self.followed)


def cut_rounds(
    requests: Sequence[EditRequest],
    spec: JobSpec,
    cut: Callable[[Sequence[EditRequest]], list[Shard]],
) -> Rounds:
    """Put requests into rounds as `spec.rounds` says, all into one if it is null.

    Args:
        requests: those that can be edited.
        spec: the job.
        cut: cuts a round's requests into shards.

    Raises:
        InputError: what `spec.rounds` asks for does not fit the requests.
    """
    kinds, study = spec.evaluation.probes, spec.rounds
    if study is None:
        return Rounds((cut(requests),), (0,), kinds)
    ordered = in_order(requests, study, spec.seed)
    starts = range(0, len(ordered), study.size)[: study.count]
    rounds = [ordered[start : start + study.size] for start in starts]
    return Rounds(
        tuple(cut(members) for members in rounds),
        evaluated_rounds(study, len(rounds)),
        kinds,
        study.evaluate,
        followed_edits(rounds, study, spec.seed),
        untouched_facts(ordered[sum(map(len, rounds)) :], study, spec.seed),
    )


def in_order(requests: Sequence[EditRequest], spec: RoundsSpec, seed: int) -> list[EditRequest]:
    """Put requests into the order in which rounds take them.

    Raises:
        InputError: they are to be grouped by relation and not one names any.
    """
    found = list(requests)
    if spec.order == "shuffled":
        random.Random(f"{seed} order").shuffle(found)
    if spec.order in ("file", "shuffled"):
        return found
    names = [r.relation_id if spec.order == "relation" else r.subject for r in found]
    if not any(names):
        raise InputError(
            "rounds.order: relation: no request has a relation_id; choose another order"
        )
    place = {name: number for number, name in enumerate(dict.fromkeys(names))}
    pairs = sorted(zip(names, found, strict=True), key=lambda pair: place[pair[0]])
    return [request for _, request in pairs]


def evaluated_rounds(spec: RoundsSpec, count: int) -> tuple[int, ...]:
    """The rounds of `count` after which something is scored.

    Raises:
        InputError: a round that the spec lists does not exist.
    """
    if spec.evaluate_after is None:
        return tuple(
            round
            for round in range(count)
            if (round + 1) % spec.evaluate_every == 0 or round == count - 1
        )
    if spec.evaluate_after[-1] >= count:
        raise InputError(
            f"rounds.evaluate_after: there is no round {spec.evaluate_after[-1]}: the requests make"
            f" {count} rounds, the last is {count - 1}"
        )
    return spec.evaluate_after


def followed_edits(
    rounds: Sequence[Sequence[EditRequest]], spec: RoundsSpec, seed: int
) -> frozenset[str] | None:
    """Draw the past edits to score, as many from each round as their number allows.

    The last round's edits are never past ones.
    """
    if spec.past_sample is None:
        return None
    generator = random.Random(f"{seed} past")
    past = [generator.sample(list(requests), len(requests)) for requests in rounds[:-1]]
    # First one of every round, in an order that is drawn too, then a second one, and so on.
    turns = generator.sample(range(len(past)), len(past))
    places = sorted(
        (place, turn, request.case_id)
        for turn, requests in zip(turns, past, strict=True)
        for place, request in enumerate(requests)
    )
    return frozenset(case_id for _, _, case_id in places[: spec.past_sample])


def untouched_facts(
    left: Sequence[EditRequest], spec: RoundsSpec, seed: int
) -> tuple[EditRequest, ...]:
    """Draw the untouched facts to score from the requests that no round edits.

    Raises:
        InputError: there is none whose true object is known.
    """
    if "untouched" not in spec.evaluate:
        return ()
    known = [request for request in left if request.target_true is not None]
    if not known:
        raise InputError(
            "rounds.evaluate: untouched: no request with a target_true is left over; set"
            " rounds.count, or read more requests"
        )
    generator = random.Random(f"{seed} untouched")
    return tuple(generator.sample(known, min(spec.untouched_sample, len(known))))
