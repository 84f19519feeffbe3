"""Rounds that know nothing of one another, made at the same time: a lane a worker.

A study that rolls back begins every round at the unedited model. A worker then makes whole rounds,
one after another, with a reducer of its own, so that nothing waits for the other workers. What a
round gives does not depend on which worker made it.
"""

import contextvars
import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from pipeline.cluster.engine import Engine
from pipeline.cluster.plan import Plan
from pipeline.cluster.progress import PhaseProgress, Ticker
from pipeline.cluster.scheduler import Ended, Scheduler
from pipeline.watching import logs
from pipeline.watching.watch import Watch

_PHASE = "rounds"


@dataclass(frozen=True)
class Lane:
    """One worker that makes rounds.

    Attributes:
        engine: that worker, and a reducer for it.
        scheduler: reaches it.
        progress: the seconds of its phases; shows nothing.
    """

    engine: Engine
    scheduler: Scheduler
    progress: PhaseProgress


def run_lanes(
    engine: Engine,
    scheduler: Scheduler,
    progress: PhaseProgress,
    plan: Plan,
    rounds: Sequence[int],
    make: Callable[[int, Lane], None],
) -> None:
    """Make rounds, each by the first lane that is free.

    The phases of all lanes enter `progress` with their shares of the time that the rounds took.

    Args:
        engine: its workers hold no update, and hold none afterwards.
        scheduler: of all workers; it is left alone meanwhile.
        progress: shows how far it is.
        plan: the study.
        rounds: which are left.
        make: makes a round and leaves the lane's worker unedited.

    Raises:
        Exception: whatever a round raised first; the other lanes have ended after their round.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for round in rounds:
        waiting.put(round)
    errors: list[BaseException] = []
    ended = threading.Event()
    before = progress.seconds.get(_PHASE, 0.0)
    with ExitStack() as open_lanes:
        lanes = []
        for worker in scheduler.workers[: len(rounds)]:
            own = open_lanes.enter_context(engine.lane(worker))
            lanes.append(Lane(own, scheduler.beside(own), PhaseProgress()))
        total = len(plan.rounds.shards)
        ticker = open_lanes.enter_context(progress.phase(_PHASE, total, total - len(rounds)))

        def drive(lane: Lane) -> None:
            try:
                _drive(lane, waiting, ended, ticker, make, plan, progress.watch)
            except BaseException as error:  # raised by the thread that started this one
                errors.append(error)
                ended.set()

        try:
            _run_all([lambda lane=lane: drive(lane) for lane in lanes], ended)  # type: ignore[misc]
        finally:
            open_lanes.close()
            _share_out(progress, before, [lane.progress for lane in lanes])
    if errors:
        raise errors[0]


def _run_all(jobs: Sequence[Callable[[], None]], ended: threading.Event) -> None:
    """Run each job in a thread of its own; a signal ends them after what they are at."""
    contexts = [contextvars.copy_context() for _ in jobs]
    threads = [
        threading.Thread(target=context.run, args=(job,))
        for context, job in zip(contexts, jobs, strict=True)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        ended.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise


def _drive(
    lane: Lane,
    waiting: "queue.SimpleQueue[int]",
    ended: threading.Event,
    ticker: Ticker,
    make: Callable[[int, Lane], None],
    plan: Plan,
    watch: Watch | None,
) -> None:
    under_way = -1

    def seen(call: Ended) -> None:
        """Tell the watch of a call, whose version it takes for that of a study that goes on."""
        assert watch is not None
        before = under_way * len(plan.layers)
        version = None if call.version is None else call.version + before
        watch.call_ended(replace(call, version=version))

    if watch is not None:
        lane.scheduler.observers.append(seen)
    while not ended.is_set():
        try:
            under_way = waiting.get_nowait()
        except queue.Empty:
            return
        with logs.about(round=under_way):
            make(under_way, lane)
        ticker.advance(1)


def _share_out(progress: PhaseProgress, before: float, lanes: Sequence[PhaseProgress]) -> None:
    """Put the phases of the lanes in the place of the one that they have made together."""
    took = progress.seconds.pop(_PHASE) - before
    phases: Counter[str] = Counter()
    for lane in lanes:
        phases.update(lane.seconds)
    busy = sum(phases.values())
    for name, seconds in phases.items():
        progress.seconds[name] = progress.seconds.get(name, 0.0) + took * seconds / busy
