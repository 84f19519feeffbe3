"""Studies of small rounds on shared workers: each begins with another one, or all with the first.

    python -m benchmarks.small_rounds --workers 4 --studies 4

Every study has a scheduler and a thread of its own, as studies that are made side by side have,
and goes through rounds that have work for one worker. The workers are simulated: each takes one
call at a time, in the order in which they came, and a call sleeps, so that the scheduler's choice
alone is measured, whatever else the machine does. Both ways take turns; the medians' ratio counts.
"""

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import RESULTS, report
from benchmarks.scheduler import NoOpEngine
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.engine import Call
from pipeline.cluster.scheduler import Scheduler

_PHASES = ("values", "read_keys")


class SleepingWorkers:
    """Workers that several studies share, each with a queue of calls that take so long."""

    def __init__(self, count: int, seconds: float) -> None:
        self.seconds = seconds
        self.queues = [ThreadPoolExecutor(1) for _ in range(count)]

    def close(self) -> None:
        """End the workers' threads."""
        for queue in self.queues:
            queue.shutdown()


class Guest(NoOpEngine):
    """One study's way to the shared workers."""

    def __init__(self, workers: SleepingWorkers) -> None:
        super().__init__(len(workers.queues))
        self._workers = workers

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        """Put a call behind those that wait for the worker."""
        queue = self._workers.queues[worker]
        return Call(worker, queue.submit(time.sleep, self._workers.seconds))

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        """Calls that have been answered."""
        handles: list[Future[None]] = [call.handle for call in calls]
        done = wait(handles, timeout, FIRST_COMPLETED).done
        return [call for call in calls if call.handle in done]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    workers = SleepingWorkers(arguments.workers, arguments.milliseconds / 1e3)
    apart: list[float] = []
    alike: list[float] = []
    try:
        for _ in range(arguments.repeats):
            apart.append(_seconds(workers, arguments.studies, arguments.rounds, is_apart=True))
            alike.append(_seconds(workers, arguments.studies, arguments.rounds, is_apart=False))
    finally:
        workers.close()
    row: dict[str, Any] = {
        "workers": arguments.workers,
        "studies": arguments.studies,
        "rounds": arguments.rounds,
        "call_milliseconds": arguments.milliseconds,
        "apart_seconds": median(apart),
        "alike_seconds": median(alike),
        "times_faster": median(alike) / median(apart),
    }
    report("small_rounds", row, arguments.results)
    return row


def _seconds(workers: SleepingWorkers, studies: int, rounds: int, *, is_apart: bool) -> float:
    """Until the last study has made all its rounds."""
    (shard,) = cut_shards(("an edit",), 1)

    def make(place: int) -> None:
        first = place % len(workers.queues) if is_apart else 0
        scheduler = Scheduler(Guest(workers), max_retries=0, stall_seconds=600, first=first)
        for _ in range(rounds):
            for phase in _PHASES:
                list(scheduler.run(phase, [shard], lambda _, items: (items,)))

    start = time.perf_counter()
    with ThreadPoolExecutor(studies) as threads:
        list(threads.map(make, range(studies)))
    return time.perf_counter() - start


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--workers", type=int, default=4)
    made.add_argument("--studies", type=int, default=4)
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--milliseconds", type=float, default=10.0, help="of a call")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--results", type=Path, default=RESULTS)
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
