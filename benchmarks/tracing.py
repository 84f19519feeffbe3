"""Causal tracing of many facts at once against one restored state at a time.

    python -m benchmarks.tracing --model MODEL --requests COUNTERFACT.json

The plain way is the published one: a pass for every restored state, two for a severed one. It
traces a part of the facts, evenly spaced, in the same order of tokens and layers; the times are
compared per fact. A plain way with one first pass a fact for all severed states is timed, too. All
have the same noise, so their maps are compared.

With `--workers W` the job of `editfleet trace` traces the same facts, too, on Ray with W workers of
one thread: seconds of its phase, so without starting and loading, with sending and writing. Give
the plain way as many threads (`--threads W`, wall clock), and both have the whole machine.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from benchmarks.machine import print_goals, print_table, report
from benchmarks.plain_tracing import plain_map
from benchmarks.timing import Timed, alternate
from benchmarks.workload import Workload, parser, spread
from pipeline.cluster.tracing import run_trace
from pipeline.spec import TraceSpec
from pipeline.tracing.facts import subject_ids, tokenize_facts
from pipeline.tracing.names import KINDS, Kind
from pipeline.tracing.recording import embedding_deviation
from pipeline.tracing.trace import FactTrace, TraceSettings, trace

GOAL_RATIO = 20.0
_SHARED = ", first pass shared"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    work = Workload.of(arguments)
    facts = tokenize_facts(work.tokenizer, work.requests, known=False)
    chosen = list(spread(len(facts), arguments.plain_facts))
    subjects = sorted({request.subject for request in work.requests})
    model, plain = work.model, work.plain_model
    sigma = embedding_deviation(plain, subject_ids(work.tokenizer, subjects))
    settings = TraceSettings(
        noise=3 * sigma,
        samples=arguments.samples,
        window=arguments.window,
        kinds=tuple(arguments.kinds),
    )

    def batched(kinds: Sequence[Kind]) -> list[FactTrace]:
        own = replace(settings, kinds=tuple(kinds))
        return trace(model, facts, own, max_tokens=work.max_tokens)

    def one_by_one(kind: Kind, shares: bool = False) -> list[list[list[float]]]:
        return [
            plain_map(plain, facts[i], kind, settings, shares_first_pass=shares) for i in chosen
        ]

    ways: dict[str, Any] = {
        "all kinds, batched": lambda: batched(settings.kinds),
        "states, batched": lambda: batched(["state"]),
    }
    for kind in settings.kinds:
        ways[f"{kind}, plain"] = lambda kind=kind: one_by_one(kind)
        if kind.startswith("severed"):
            ways[f"{kind}, plain{_SHARED}"] = lambda kind=kind: one_by_one(kind, shares=True)
    timed = alternate(ways, arguments.repeats, arguments.clock)
    # A pass's work grows with its tokens, and so does the number of passes.
    lengths = [len(fact.ids) for fact in facts]
    share = sum(lengths[i] ** 2 for i in chosen) / sum(length**2 for length in lengths)
    seconds = {
        name: run.seconds / (share if "plain" in name else 1.0) for name, run in timed.items()
    }
    all_plain = sum(seconds[f"{kind}, plain"] for kind in settings.kinds)
    shared = sum(
        seconds.get(f"{kind}, plain{_SHARED}", seconds[f"{kind}, plain"]) for kind in settings.kinds
    )
    found = timed["all kinds, batched"].result
    row: dict[str, Any] = {
        "dtype": work.spec.model.dtype,
        "clock": arguments.clock,
        "facts": len(facts),
        "plain_facts": len(chosen),
        "samples": settings.samples,
        "window": settings.window,
        "kinds": ",".join(settings.kinds),
        "milliseconds_a_fact": 1e3 * seconds["all kinds, batched"] / len(facts),
        "ratio": all_plain / seconds["all kinds, batched"],
        "ratio_to_shared_first_passes": shared / seconds["all kinds, batched"],
        "states_ratio": seconds["state, plain"] / seconds["states, batched"],
        "peak_megabytes": timed["all kinds, batched"].peak_bytes / 1e6,
        "largest_difference": max(
            _difference(found, chosen, kind, timed) for kind in settings.kinds
        ),
    }
    if arguments.workers:
        job = _job_seconds(arguments, work)
        row |= {
            "workers": arguments.workers,
            "threads_of_plain": arguments.threads,
            "job_milliseconds_a_fact": 1e3 * job / len(facts),
            "job_ratio": all_plain / job,
        }
    print_table(
        f"tracing {len(facts)} facts: medians of {arguments.repeats} rounds",
        ("way", "seconds (plain: for all facts)", "ms a fact", "peak MB"),
        [
            (name, seconds[name], 1e3 * seconds[name] / len(facts), run.peak_bytes / 1e6)
            for name, run in timed.items()
        ],
    )
    report("tracing", row, arguments.results)
    goals = {
        "tracing, times faster": (row["ratio"], ">=", GOAL_RATIO),
        "states alone, times faster": (row["states_ratio"], ">=", GOAL_RATIO),
    }
    if arguments.workers:
        goals["the job's workers, times faster"] = (row["job_ratio"], ">=", GOAL_RATIO)
    print_goals(goals)
    return row


def _job_seconds(arguments: argparse.Namespace, work: Workload) -> float:
    """Median seconds of the tracing phase of a job on Ray."""
    workers = {"workers": arguments.workers, "cpus_per_worker": 1}
    settings = TraceSpec(
        kinds=arguments.kinds, samples=arguments.samples, window=arguments.window, known_only=False
    )
    seconds = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            spec = work.spec.model_copy(
                update={
                    "trace": settings,
                    "cluster": work.spec.cluster.model_copy(update=workers),
                    "output": work.spec.output.model_copy(update={"path": f"{folder}/run"}),
                }
            )
            result = run_trace(spec)
            seconds.append(float(result.summary["seconds"]["trace"]))
    return median(seconds)


def _difference(
    found: Sequence[FactTrace], chosen: Sequence[int], kind: Kind, timed: dict[str, Timed]
) -> float:
    """Largest difference of a probability between both ways."""
    plain: list[list[list[float]]] = timed[f"{kind}, plain"].result
    return max(
        float(np.abs(found[i].restored[kind] - np.array(values)).max())
        for i, values in zip(chosen, plain, strict=True)
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], edits=32)
    made.add_argument("--plain-facts", type=int, default=2, help="facts the plain way traces")
    made.add_argument("--samples", type=int, default=10, help="noise samples")
    made.add_argument("--window", type=int, default=3, help="blocks in a window")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    made.add_argument("--workers", type=int, help="trace with the job on Ray, too, by so many")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
