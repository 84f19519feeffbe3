"""Edit N CounterFact facts as a user would, and measure wall time per phase and peak memory.

    python -m benchmarks.end_to_end --edits 1000 --model MODEL --requests COUNTERFACT.json \
        --corpus CORPUS.json --run runs/cf-1k

Runs the installed command in a process of its own and samples the memory of all processes below it
(proportional set size, so that shared pages count once). Prints a table and appends a row to
benchmarks/results.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import RESULTS, print_goals, report
from pipeline import results

SPEC = Path(__file__).parents[1] / "jobs" / "specs" / "counterfact_12m.yaml"
SECONDS_BETWEEN_SAMPLES = 5.0
GOAL_EDITS = 10_000
# float32 throughout, or bfloat16 for values and evaluation.
GOAL_MINUTES = {"float32": 35.0, "bfloat16": 15.0}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    command = [
        sys.executable,
        *("-c", "from pipeline.cli import main; main()"),
        *("edit", str(arguments.spec)),
        *_set("model.path", arguments.model),
        *_set("requests.path", arguments.requests),
        *_set("requests.limit", arguments.edits),
        *_set("covariance.corpus", arguments.corpus),
        *_set("output.path", arguments.run),
        *(part for override in arguments.set for part in ("--set", override)),
    ]
    start = time.perf_counter()
    peak, code = _run_measured(command)
    seconds = time.perf_counter() - start
    if not (arguments.run / "summary.json").exists():
        sys.exit(f"the job left no summary; its exit code was {code}")
    run = results.read(arguments.run)
    row = _row(run, arguments.edits, seconds, peak, code)
    report("end_to_end", row, arguments.results)
    if arguments.edits == GOAL_EDITS and row["dtype"] in GOAL_MINUTES:
        minutes = GOAL_MINUTES[row["dtype"]]
        print_goals({f"minutes for {GOAL_EDITS:,} edits": (seconds / 60, "<=", minutes)})
    return row


def _row(run: Any, edits: int, seconds: float, peak: int, code: int) -> dict[str, Any]:
    after = run.summary["evaluation"]["rounds"][-1]
    return {
        "dtype": run.manifest["model"]["dtype"],
        "edits": edits,
        "edit_rows": run.edits().num_rows,
        "exit_code": code,
        "seconds": seconds,
        **{f"seconds_{name}": value for name, value in run.summary["seconds"].items()},
        "peak_gigabytes": peak / 1e9,
        **{score: after[score]["score"] for score in ("ES", "PS", "NS", "S")},
        **{f"exact_{kind}": probe["exact"]["score"] for kind, probe in after["probes"].items()},
    }


def _run_measured(command: list[str]) -> tuple[int, int]:
    """Run a command; peak bytes of all processes below it, and its exit code."""
    process = subprocess.Popen(command, env=os.environ)
    peak = 0
    while process.returncode is None:
        peak = max(peak, _tree_bytes(process.pid))
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_BETWEEN_SAMPLES)
    return peak, process.returncode


def _tree_bytes(root: int) -> int:
    total = 0
    try:
        tree = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it ended between the listing and the look
    return total


def _set(name: str, value: object) -> tuple[str, str]:
    return "--set", f"{name}={value}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, required=True)
    for name in ("model", "requests", "corpus"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--run", type=Path, required=True, help="run directory, a new one")
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
