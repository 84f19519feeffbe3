"""The scheduler: shards to workers, dynamically, with versions, retries and blame.

One loop serves every phase. A shard lost with its worker is tried again; a shard on which our code
fails is split until the guilty request is alone, which then fails with its reason.
See docs/design.md, "Weights and versions".
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.cluster.engine import Call, Engine, WorkerLostError
from pipeline.cluster.roster import Roster, Told
from pipeline.cluster.shards import Piece, PieceQueue, Shard
from pipeline.cluster.waiting import Waiter
from pipeline.editing.update import Change
from pipeline.errors import (
    DivergedError,
    EditfleetError,
    JobFailedError,
    WeightVersionMismatchError,
)
from pipeline.results.timings import CallOutcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """A piece of a shard that worked; one piece a shard unless it had to be split."""

    start: int
    items: tuple[Any, ...]
    result: Any
    reference: Any


@dataclass
class Outcome:
    """What came of a shard: the pieces that worked, in order, and (item, reason) of the rest."""

    shard: Shard
    done: list[Done] = field(default_factory=list)
    failures: list[tuple[Any, str]] = field(default_factory=list)
    open: int = 1

    @property
    def survivors(self) -> tuple[Any, ...]:
        """The items that worked, in order."""
        return tuple(item for piece in self.done for item in piece.items)


@dataclass(frozen=True)
class Ended:
    """A call to a worker that has just ended, for those who watch.

    `round` and `version` are what the call was given, None where it takes none.
    """

    method: str
    worker: int
    seconds: float
    outcome: CallOutcome
    shard: int | None = None
    items: int | None = None
    retries: int = 0
    round: int | None = None
    version: int | None = None


# Given a piece's shard and items: the method's positional arguments.
Arguments = Callable[[Shard, tuple[Any, ...]], tuple[Any, ...]]


class Scheduler:
    """Runs phases over the engine's workers and keeps their weights at one version.

    Args:
        engine: where the workers live.
        max_retries: times that a shard is tried again after an infrastructure error.
        stall_seconds: say what has been out for longer than this.
        call_timeout_seconds: take a worker for lost that has not answered for this long.
        first: the worker that gets a shard before the others. Studies that share workers begin
            with different ones, since a small round has work for one.
    """

    def __init__(
        self,
        engine: Engine,
        max_retries: int,
        stall_seconds: float,
        call_timeout_seconds: float | None = None,
        first: int = 0,
    ) -> None:
        self.engine = engine
        self.max_retries = max_retries
        self._first = first
        self._waiter = Waiter(engine, stall_seconds, call_timeout_seconds)
        self._roster = Roster(engine, self._waiter, max_retries, engine.late)
        self.version = 0
        self._told: list[Told] = []
        self._home: dict[str, dict[int, int]] = {}
        self.observers: list[Callable[[Ended], None]] = []

    def run(
        self,
        method: str,
        shards: Sequence[Shard],
        arguments: Arguments,
        *,
        split: bool = True,
        **settings: Any,
    ) -> Iterator[Outcome]:
        """Run a method over shards; outcomes come as they are complete, in any order.

        Every worker has one call under way and takes the next shard when it is done; one that
        comes late takes the next shard, too. A shard goes back to the worker that had it before,
        where that one is free, since it may have kept state.

        Args:
            method: name of a method of `EditWorker`.
            shards: what to run it over.
            arguments: makes its positional arguments.
            split: look for the guilty item when the method fails; else the error ends the job.
            settings: keyword arguments.

        Raises:
            JobFailedError: a shard was lost more often than `max_retries`.
        """
        pieces = (Piece(shard, 0, shard.items) for shard in shards)
        waiting = PieceQueue(pieces, self._home.setdefault(method, {}))
        outcomes = {shard.index: Outcome(shard) for shard in shards}
        under_way: dict[Call, Piece] = {}
        while waiting or under_way:
            idle = self._roster.present - {call.worker for call in under_way}
            while waiting and idle:
                worker, piece = waiting.take(idle, self._first)
                idle.discard(worker)
                given = arguments(piece.shard, piece.items)
                under_way[self.engine.submit(worker, method, *given, **settings)] = piece
            shards_out = {call: f"shard {p.shard.index}" for call, p in under_way.items()}
            for call in self._roster.wait(method, shards_out):
                piece = under_way.pop(call)
                outcome = outcomes[piece.shard.index]
                seconds = call.age
                came_of_it = self._settle(call, piece, waiting, outcome, split)
                self._announce(
                    Ended(
                        method,
                        call.worker,
                        seconds,
                        came_of_it,
                        piece.shard.index,
                        len(piece.items),
                        piece.retries,
                        settings.get("round"),
                        settings.get("version"),
                    )
                )
                if outcome.open == 0:
                    outcome.done.sort(key=lambda done: done.start)
                    yield outcomes.pop(piece.shard.index)

    def broadcast(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method on every worker that is there and wait; one that is lost is left out."""
        return self._insist(method, lambda: sorted(self._roster.present), args, kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method on one worker and wait."""
        (found,) = self._insist(method, lambda: [self._roster.anyone(self._first)], args, kwargs)
        return found

    def prepare(self) -> None:
        """Let every worker, and those that come later, load what the method uses beside models."""
        self._tell("prepare")

    def set_contexts(self, contexts: tuple[str, ...]) -> None:
        """Hand the context templates to every worker, and to those that come later."""
        self._tell("set_contexts", contexts)

    def set_anchor_norm(self, norm: float) -> None:
        """Hand the norm anchor to every worker, and to those that come later."""
        self._tell("set_anchor_norm", norm)

    def set_queries(self, queries: Any) -> None:
        """Hand remembered queries to every worker, and to those that replace them."""
        self._tell("set_queries", queries)

    def _tell(self, method: str, *args: Any) -> None:
        self._told.append(lambda: (method, args, {}))
        self._roster.remember(self._told[-1])
        self.broadcast(method, *args)

    def apply(self, layer: int, update: Change, reload: Callable[[], Change] | None = None) -> None:
        """Bring an update or an adapter to every worker: one put, then one version up everywhere.

        Args:
            layer: the edited block.
            update: its change.
            reload: makes the change again, to the same bits, for a worker that starts later; null
                keeps the shared one, which a study's hundreds are too many for.
        """
        reference, version = self.engine.share(update), self.version
        again = reload or (lambda: reference)
        self._roster.remember(lambda: ("apply", (layer, again()), {"version": version}))
        self.version += 1
        calls = [
            self.engine.submit(worker, "apply", layer, reference, version=version)
            for worker in sorted(self._roster.present)
        ]
        for call in calls:
            came_of_it: CallOutcome = "done"
            try:
                self._waiter.result(call, "apply")
                seconds = call.age
            except WorkerLostError as error:
                came_of_it, seconds = "lost", call.age
                self._roster.lose(call.worker, error)
            self._announce(Ended("apply", call.worker, seconds, came_of_it, version=version))

    def revert(self) -> None:
        """Put the unedited weights back everywhere: version 0."""
        self._roster.remember_only(self._told)
        self.version = 0
        self.broadcast("revert")

    def beside(self, engine: Engine) -> "Scheduler":
        """A scheduler over some of this one's workers, at version 0, which know what these know."""
        waiter = self._waiter
        times = waiter.stall_seconds, waiter.call_timeout_seconds
        other = Scheduler(engine, self.max_retries, *times)
        other._told = list(self._told)
        other._roster.remember_only(self._told)
        return other

    @property
    def workers(self) -> list[int]:
        """Numbers of the workers that are there."""
        return sorted(self._roster.present)

    def _announce(self, ended: Ended) -> None:
        for observer in self.observers:
            observer(ended)

    def _settle(
        self, call: Call, piece: Piece, waiting: PieceQueue, outcome: Outcome, split: bool
    ) -> CallOutcome:
        """Book a finished call, and say what came of it."""
        try:
            result = self._waiter.fetch(call)
        except WorkerLostError as error:
            self._roster.lose(call.worker, error)
            if piece.retries >= self.max_retries:
                raise JobFailedError(
                    f"shard {piece.shard.index} was lost {piece.retries + 1} times, the last time:"
                    f" {error}; the finished parts are kept"
                ) from error
            waiting.put_back(replace(piece, retries=piece.retries + 1))
            return "lost"
        except (WeightVersionMismatchError, DivergedError):
            raise  # the driver's own mistake, or all weights', whatever the items
        except Exception as error:
            if not split:
                raise
            self._blame(error, piece, waiting, outcome)
            return "failed"
        outcome.done.append(Done(piece.start, piece.items, result, call.reference))
        outcome.open -= 1
        return "done"

    def _blame(self, error: Exception, piece: Piece, waiting: PieceQueue, outcome: Outcome) -> None:
        """Split a shard on which a call failed, or hold its one item responsible."""
        if len(piece.items) == 1:
            log.error(
                "shard %d: an item failed",
                piece.shard.index,
                exc_info=error,
                extra={"shard": piece.shard.index},
            )
            outcome.failures.append((piece.items[0], _reason(error)))
            outcome.open -= 1
            return
        log.warning(
            "shard %d failed (%s); splitting it",
            piece.shard.index,
            _reason(error),
            extra={"shard": piece.shard.index},
        )
        middle = len(piece.items) // 2
        upper = replace(piece, start=piece.start + middle, items=piece.items[middle:])
        waiting.put_back(replace(piece, items=piece.items[:middle]), upper)
        outcome.open += 1

    def _insist(
        self,
        method: str,
        workers: Callable[[], Sequence[int]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Any]:
        """Call a method on these workers, until one at least has answered; return the answers.

        Raises:
            JobFailedError: all that were asked were lost, more often than `max_retries`.
        """
        last: WorkerLostError | None = None
        for _ in range(self.max_retries + 1):
            self._roster.anyone()
            calls = [self.engine.submit(n, method, *args, **kwargs) for n in workers()]
            answers = []
            for call in calls:
                try:
                    answers.append(self._waiter.result(call, method))
                except WorkerLostError as error:
                    last = error
                    self._roster.lose(call.worker, error)
            if answers:
                return answers
        raise JobFailedError(f"{method} was lost {self.max_retries + 1} times: {last}") from last


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, EditfleetError) else f"{type(error).__name__}: {text}"
