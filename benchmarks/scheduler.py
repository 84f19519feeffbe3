"""What the driver itself costs: the scheduler over simulated workers that do nothing.

    python -m benchmarks.scheduler --workers 1000 --edits 1000000 --requests 100000

Runs the phases of a job of `--edits` requests over `--workers` workers that answer at once, one
answer at a time, so that all the time is the scheduler's: milliseconds a shard by phase. Then makes
the plan of `--requests` requests, read from a Parquet file, and prints what the driver would hold
with a million at the same rate, the process itself included.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.machine import RESULTS, print_goals, print_table, report
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.engine import Call, Engine
from pipeline.cluster.plan import make_plan
from pipeline.cluster.scheduler import Scheduler
from pipeline.spec import JobSpec

GOAL_MILLISECONDS = 5.0
GOAL_GIGABYTES = 2.0
_PHASES = ("values", "read_keys", "read_keys again", "evaluate")
_MILLION = 1_000_000
_ROWS_AT_ONCE = 1000
_WARM_UP = 10_000


class NoOpEngine:
    """Workers that answer at once and do nothing; the longest-waiting one answers next."""

    late: frozenset[int] = frozenset()

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        """Answer."""
        return Call(worker, method)

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        """One answer at a time, which costs the scheduler the most."""
        return list(calls[:1])

    def result(self, call: Call) -> Any:
        """Nothing."""
        return None

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def combine(self, function: Callable[[Sequence[Any]], Any], references: Sequence[Any]) -> Any:
        """Apply it here."""
        return function(references)

    def fetch(self, reference: Any) -> Any:
        """The value itself."""
        return reference

    def restart(self, worker: int) -> None:
        """Nobody is lost."""

    def needs(self) -> str:
        """Nothing."""
        return ""

    def reduce(self, method: str, *args: Any) -> Any:
        """Nothing."""
        return None

    def lane(self, worker: int) -> AbstractContextManager[Engine]:
        """This engine."""
        return nullcontext(self)

    def reducers_used(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def close(self) -> None:
        """Nothing outlives this process."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    shards = cut_shards(tuple(range(arguments.edits)), arguments.shard_size)
    scheduler = Scheduler(NoOpEngine(arguments.workers), max_retries=2, stall_seconds=60)
    milliseconds: dict[str, float] = {}
    for phase in _PHASES:
        start = time.perf_counter()
        done = sum(1 for _ in scheduler.run(phase.split()[0], shards, lambda _, items: (items,)))
        milliseconds[phase] = (time.perf_counter() - start) / done * 1e3
    _plan_bytes(_WARM_UP)  # what the first one loads, and its buffers, are no request's
    before, after = _plan_bytes(arguments.requests)
    added = (after - before) / arguments.requests * _MILLION
    row: dict[str, Any] = {
        "workers": arguments.workers,
        "edits": arguments.edits,
        "shards": len(shards),
        **{f"{name.replace(' ', '_')}_milliseconds": ms for name, ms in milliseconds.items()},
        "requests": arguments.requests,
        "process_gigabytes": before / 1e9,
        "gigabytes_a_million": added / 1e9,
    }
    print_table(
        f"the scheduler alone: {len(shards)} shards, {arguments.workers} workers",
        ("phase", "ms a shard"),
        list(milliseconds.items()),
    )
    report("scheduler", row, arguments.results)
    print_goals(
        {
            "milliseconds a shard": (max(milliseconds.values()), "<=", GOAL_MILLISECONDS),
            "GB with 1,000,000 requests": ((before + added) / 1e9, "<=", GOAL_GIGABYTES),
        }
    )
    return row


def _plan_bytes(count: int) -> tuple[int, int]:
    """Resident bytes before and with the plan of so many requests, each with a paraphrase."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "requests.parquet"
        _write_requests(path, count)
        content = {"model": {"path": "factworld"}, "requests": {"path": str(path)}}
        spec = JobSpec.model_validate({**content, "output": {"path": directory}})
        before = _resident_bytes()
        plan = make_plan(spec)
        after = _resident_bytes()
    assert plan.num_requests == count, "some requests were refused"
    return before, after


def _write_requests(path: Path, count: int) -> None:
    """Some at a time: what writing leaves free in the process would not be counted when reading."""
    with pq.ParquetWriter(path, _requests(range(1)).schema) as writer:
        for start in range(0, count, _ROWS_AT_ONCE):
            writer.write_table(_requests(range(start, min(start + _ROWS_AT_ONCE, count))))


def _requests(numbers: range) -> pa.Table:
    subjects = [f"Person {i:07d}" for i in numbers]
    return pa.table(
        {
            "case_id": [str(i) for i in numbers],
            "subject": subjects,
            "prompt": ["{} was born in the city of"] * len(numbers),
            "target_new": [f"Town {i % 997}" for i in numbers],
            "target_true": [f"Village {i % 991}" for i in numbers],
            "paraphrase_prompts": [[f"The birthplace of {subject} is"] for subject in subjects],
        }
    )


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--workers", type=int, default=1000)
    made.add_argument("--edits", type=int, default=_MILLION)
    made.add_argument("--shard-size", type=int, default=16)
    made.add_argument("--requests", type=int, default=100_000, help="requests of the plan")
    made.add_argument("--results", type=Path, default=RESULTS)
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
