"""The batched value search against the plain one-edit-at-a-time procedure, in the same process.

    python -m benchmarks.values --model MODEL --requests COUNTERFACT.json [--public CHECKOUT]

Prints time an edit, FLOP/s (benchmarks/flops.py says what is counted), the padding share and the
largest relative difference of z; with `--public`, against the code published with MEMIT as well.
The slow ways search a part of the edits, evenly spaced; every ratio compares milliseconds an edit
and forward pass, since edits differ in how many passes they need.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.flops import ModelSize, value_flops
from benchmarks.machine import print_goals, print_table, report
from benchmarks.plain_values import plain_value, plain_value_flops
from benchmarks.public_values import PublicValues
from benchmarks.timing import alternate, matmul_rate
from benchmarks.workload import Workload, parser, spread
from pipeline.editing import values as values_module
from pipeline.editing.suffixes import SuffixBatch
from pipeline.editing.values import FoundValue, find_values
from pipeline.methods.settings import value_settings

GOAL_RATIO = {"float32": 8.0, "bfloat16": 25.0}
GOAL_DIFFERENCE = 1e-4
GOAL_PADDING = 0.1
_BATCH = {"cpu": 16, "cuda": 256}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    work = Workload.of(arguments)
    layer, settings = work.layers[-1], value_settings(work.spec.method)
    chosen = spread(len(work.edits), arguments.plain_edits)
    batch = arguments.batch or _BATCH[work.device.type]
    plain_model = work.plain_model
    runs: dict[str, Callable[[], Any]] = {
        "batched": lambda: _counted(
            lambda: find_values(work.model, work.edits, layer, settings, batch)
        ),
        "plain": lambda: [plain_value(plain_model, work.edits[i], layer, settings) for i in chosen],
    }
    if arguments.public is not None:
        public = PublicValues(
            arguments.public,
            work.load_plain_model(),
            work.tokenizer,
            layer,
            settings,
            work.contexts,
        )
        runs["public"] = lambda: [public(work.requests[i]) for i in chosen]
    timed = alternate(runs, arguments.repeats, arguments.clock)
    found: list[FoundValue] = timed["batched"].result[0]
    padding: float = timed["batched"].result[1]

    size = ModelSize.of(work.model)
    steps = {"batched": [value.steps for value in found]}
    steps["plain"] = steps["public"] = [taken for _, taken in timed["plain"].result]
    flops = {"batched": value_flops(size, work.edits, found, layer)}
    flops["plain"] = flops["public"] = sum(
        plain_value_flops(size, work.edits[i], taken, layer)
        for i, taken in zip(chosen, steps["plain"], strict=True)
    )
    values = {
        "plain": [z for z, _ in timed["plain"].result],
        "public": timed["public"].result if "public" in timed else [],
    }
    milliseconds = {
        name: 1e3 * run.seconds / sum(taken + 1 for taken in steps[name])
        for name, run in timed.items()
    }
    print_table(
        f"values, {work.spec.model.dtype}: medians of {arguments.repeats} rounds",
        ("way", "edits", "ms an edit", "passes", "ms a pass", "ratio", "GFLOP/s", "z differs"),
        [
            (
                name,
                len(steps[name]),
                1e3 * run.seconds / len(steps[name]),
                sum(steps[name]) / len(steps[name]) + 1,
                milliseconds[name],
                milliseconds[name] / milliseconds["batched"],
                flops[name] / run.seconds / 1e9,
                _difference([found[i] for i in chosen], values[name]) if name in values else 0.0,
            )
            for name, run in timed.items()
        ],
    )
    row: dict[str, Any] = {
        "dtype": work.spec.model.dtype,
        "clock": arguments.clock,
        "edits": len(found),
        "batch": batch,
        "edits_per_second": len(found) / timed["batched"].seconds,
        "gigaflops_an_edit": flops["batched"] / len(found) / 1e9,
        "gigaflops_per_second": flops["batched"] / timed["batched"].seconds / 1e9,
        "matmul_gigaflops_per_second": matmul_rate(work.device, work.model.dtype) / 1e9,
        "padding_share": padding,
        "peak_megabytes": timed["batched"].peak_bytes / 1e6,
        "target_probability": sum(value.target_probability for value in found) / len(found),
    }
    ways = [name for name in ("plain", "public") if name in timed]
    for name in ways:
        row[f"{name}_ratio"] = milliseconds[name] / milliseconds["batched"]
        row[f"{name}_gigaflops_per_second"] = flops[name] / timed[name].seconds / 1e9
        row[f"{name}_difference"] = _difference([found[i] for i in chosen], values[name])
    report("values", row, arguments.results)
    _print_goals(row, ways)
    return row


def _print_goals(row: dict[str, Any], ways: Sequence[str]) -> None:
    goals: dict[str, tuple[float, str, float]] = {}
    for name in ways:
        goals[f"times faster than the {name} way"] = (
            row[f"{name}_ratio"], ">=", GOAL_RATIO[row["dtype"]]
        )  # fmt: skip
        if row["dtype"] == "float32":
            goals[f"relative difference of z, {name}"] = (
                row[f"{name}_difference"], "<=", GOAL_DIFFERENCE
            )  # fmt: skip
    print_goals({**goals, "padding share": (row["padding_share"], "<=", GOAL_PADDING)})


def _counted(search: Callable[[], list[FoundValue]]) -> tuple[list[FoundValue], float]:
    """What a search finds, and the share of its suffix tokens that only fill rows, at the start."""
    with _encoded_batches() as sizes:
        found = search()
    return found, 1.0 - sum(real for real, _ in sizes) / sum(carried for _, carried in sizes)


@contextmanager
def _encoded_batches() -> Iterator[list[tuple[int, int]]]:
    """Real and carried suffix tokens of every batch that is encoded while the context is open."""
    sizes: list[tuple[int, int]] = []
    encode = values_module.encode_suffixes

    def record(*args: Any, **options: Any) -> SuffixBatch:
        batch = encode(*args, **options)
        sizes.append((batch.num_tokens, batch.hidden.shape[0] * batch.hidden.shape[1]))
        return batch

    values_module.encode_suffixes = record
    try:
        yield sizes
    finally:
        values_module.encode_suffixes = encode


def _difference(found: Sequence[FoundValue], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((value.z - plain).norm() / plain.norm()) for value, plain in pairs)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], edits=128)
    made.add_argument("--plain-edits", type=int, default=8, help="edits that the slow ways search")
    made.add_argument("--batch", type=int, help="edits at once; the worker's own by default")
    made.add_argument("--public", type=Path, help="a checkout of kmeng01/memit to measure against")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
