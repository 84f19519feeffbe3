"""How the main job scales with workers: measured in pieces, then put together for more of them.

    python -m benchmarks.scaling --model M --requests R --corpus C --edits 1000 --shard-size 16

Runs the job once in this process with one thread and times every shard of every phase, every merge,
and the bytes that move. What W workers take follows from those by the model of `scaling_model`,
with links of `--gigabits`. With `--check W` the same job then runs on Ray with one worker and with
W, to compare. Efficiency is T(1) / (W T(W)). Models that do not fit here are in `python -m
benchmarks.scaling_shapes`.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import print_goals, print_table, report
from benchmarks.scaling_model import Costs, LayerCosts
from benchmarks.workload import parser
from pipeline.cluster import run as run_module
from pipeline.cluster.engine import Call, InProcessEngine
from pipeline.cluster.run import run_batch_edit
from pipeline.spec import JobSpec, load_spec

WORKERS = (1, 2, 8, 64, 512)
GOAL_EFFICIENCY = 0.9
_PHASES = {"values": "values", "evaluate": "evaluation"}


@dataclass
class Measured:
    """Seconds of every shard (insertion: by layer) and of the merges, and bytes that moved."""

    shards: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    keys: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    merge_seconds: float = 0.0
    apply_seconds: float = 0.0
    key_bytes: int = 0
    update_bytes: int = 0

    def costs(self, seconds: Mapping[str, float]) -> Costs:
        """What the model of scaling is made from.

        Args:
            seconds: of the phases as a whole: what is beyond the calls is the driver's.
        """
        count = len(self.keys)
        layers = [
            LayerCosts(
                keys=keys,
                merge=self.merge_seconds / count,
                apply=self.apply_seconds / count,
                inward=self.key_bytes / count,
                update=self.update_bytes / count,
            )
            for keys in self.keys.values()
        ]
        calls = {phase: list(shards) for phase, shards in self.shards.items()}
        calls["insertion"] = [s for keys in self.keys.values() for s in keys]
        beside = {"insertion": self.merge_seconds + self.apply_seconds}
        driver = {
            phase: max(0.0, seconds[phase] - sum(found) - beside.get(phase, 0.0)) / len(found)
            for phase, found in calls.items()
        }
        return Costs({name: self.shards[name] for name in _PHASES.values()}, layers, driver)


class _TimedEngine(InProcessEngine):
    """The engine of one process, with a clock."""

    measured: Measured

    def result(self, call: Call) -> Any:
        method, args, _ = call.handle
        start = time.perf_counter()
        result = super().result(call)
        seconds = time.perf_counter() - start
        if method == "read_keys":
            self.measured.keys[args[3]].append(seconds)
            self.measured.key_bytes += sum(part.nbytes for part in call.reference)
        elif method == "apply":
            self.measured.apply_seconds += seconds
            self.measured.update_bytes += sum(part.nbytes for part in args[1].parts.values())
        elif method in _PHASES:
            self.measured.shards[_PHASES[method]].append(seconds)
        return result

    def reduce(self, method: str, *args: Any) -> Any:
        start = time.perf_counter()
        result = super().reduce(method, *args)
        self.measured.merge_seconds += time.perf_counter() - start
        return result


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    with tempfile.TemporaryDirectory() as directory:
        measured, costs = _measure(_spec(arguments, Path(directory) / "one", "in_process"))
        checked: dict[int, dict[str, float]] = {}
        if arguments.check:
            for workers in (1, arguments.check):
                spec = _spec(arguments, Path(directory) / str(workers), "ray", workers)
                checked[workers] = run_batch_edit(spec).summary["seconds"]
    link = arguments.gigabits * 1e9 / 8
    row: dict[str, Any] = {
        "edits": arguments.edits,
        "shards": len(measured.shards["values"]),
        "gigabits": arguments.gigabits,
        "key_megabytes": measured.key_bytes / 1e6,
        "update_megabytes": measured.update_bytes / 1e6,
        "merge_seconds": measured.merge_seconds,
    }
    lines: list[tuple[Any, ...]] = []
    checks: list[tuple[Any, ...]] = []
    for phase in costs.phases:
        row[f"{phase}_driver_milliseconds"] = costs.driver[phase] * 1e3
        alone = costs.parts(phase, 1, link).total()
        for workers in WORKERS:
            seconds = costs.parts(phase, workers, link).total()
            row[f"{phase}_seconds_{workers}"] = seconds
            row[f"{phase}_efficiency_{workers}"] = alone / (workers * seconds)
        lines.append((phase, *(row[f"{phase}_seconds_{workers}"] for workers in WORKERS)))
        shares = [row[f"{phase}_efficiency_{workers}"] for workers in WORKERS]
        lines.append(("  efficiency", *shares))
        if checked:
            one, many = (checked[workers][phase] for workers in (1, arguments.check))
            row[f"{phase}_checked_alone_seconds"], row[f"{phase}_checked_seconds"] = one, many
            row[f"{phase}_checked_efficiency"] = one / (arguments.check * many)
            predicted = costs.parts(phase, arguments.check, link).total()
            checks.append((phase, alone, one, predicted, many, one / (arguments.check * many)))
    print_table(
        f"{arguments.edits} edits in {row['shards']} shards: seconds by workers (as predicted)",
        ("phase", *map(str, WORKERS)),
        lines,
    )
    if checked:
        print_table(
            f"seconds on Ray with 1 and with {arguments.check} workers",
            ("phase", "1 predicted", "1", f"{arguments.check} predicted", str(arguments.check),
             "efficiency"),
            checks,
        )  # fmt: skip
    report("scaling", row, arguments.results)
    if checked:
        share = row["values_checked_efficiency"]
        print_goals(
            {f"efficiency of values, {arguments.check} workers": (share, ">=", GOAL_EFFICIENCY)}
        )
    return row


def _measure(spec: JobSpec) -> tuple[Measured, Costs]:
    with _timed_engines() as engines:
        seconds = run_batch_edit(spec).summary["seconds"]
    measured = engines[0].measured
    return measured, measured.costs(seconds)


@contextmanager
def _timed_engines() -> Iterator[list[_TimedEngine]]:
    """Let jobs run on timed engines while the context is open."""
    made: list[_TimedEngine] = []
    start = run_module.start_engine

    def start_timed(spec: JobSpec) -> _TimedEngine:
        engine = _TimedEngine(spec)
        engine.measured = Measured()
        made.append(engine)
        return engine

    run_module.start_engine = start_timed
    try:
        yield made
    finally:
        run_module.start_engine = start


def _spec(arguments: argparse.Namespace, path: Path, engine: str, workers: int = 1) -> JobSpec:
    changes = {
        "model.path": arguments.model,
        "model.dtype": arguments.dtype,
        "requests.path": arguments.requests,
        "requests.limit": arguments.edits,
        "covariance.corpus": arguments.corpus,
        "cluster.engine": engine,
        "cluster.workers": workers,
        "cluster.shard_size": arguments.shard_size,
        "evaluation.baseline": "false",
        "output.path": path,
    }
    torch.set_num_threads(1)
    return load_spec(arguments.spec, [f"{name}={value}" for name, value in changes.items()])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], edits=1000)
    made.add_argument("--corpus", required=True, help="corpus of the covariance, or factworld")
    made.add_argument("--shard-size", default="auto", help="requests a shard")
    made.add_argument("--gigabits", type=float, default=10.0, help="a link's Gbit/s")
    made.add_argument("--check", type=int, help="run on Ray with so many workers, too")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
