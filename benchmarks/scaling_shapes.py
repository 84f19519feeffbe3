"""How jobs on models that do not fit here would scale: predicted from counted FLOP and rates.

    python -m benchmarks.scaling_shapes --teraflops 400 --reducer-gflops 1000
    python -m benchmarks.scaling_shapes --measured benchmarks/results/gpu.parquet

FLOP of every phase are counted (`pipeline.planning.flops`) on the shape of a published model, with
edits of CounterFact's lengths, and put into the model of `scaling_model`, which `python -m
benchmarks.scaling --check 2` compares with real runs. Rates are given, or those that `python -m
benchmarks.gpu` has measured for the shape. Prints seconds and efficiency by workers, where worker
time goes, and from how many workers on efficiency is below 80 %.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gpu_shapes import SHAPES, Shape, random_edits
from benchmarks.machine import RESULTS, append_row, describe_machine, print_table
from benchmarks.scaling_model import (
    EVEN,
    GOAL,
    PARTS,
    Costs,
    LayerCosts,
    efficiency,
    largest_loss,
)
from pipeline.cluster.cutting import cut_shards
from pipeline.cluster.plan import probe_shard_size
from pipeline.cluster.tree import FAN_IN, groups_of
from pipeline.planning.efficiency import CALL_SECONDS, EFFICIENCY
from pipeline.planning.flops import (
    ModelSize,
    factor_flops,
    key_flops,
    reduce_flops,
    scoring_flops,
    value_flops,
)
from pipeline.planning.memory import update_bytes
from pipeline.planning.outline import ModelOutline
from pipeline.prompts import EditPrompts

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SHOWN = (8, 64, 512)
DRIVER_SECONDS = {"values": 0.010, "insertion": 0.002, "evaluation": 0.010}
"""Of the driver for a shard."""
_SAMPLE = 256
_FLOAT, _DOUBLE = 4, 8
# CounterFact: a rewrite, two paraphrases and ten neighbours, each with two targets, on the model
# before and after.
_PROBES, _TARGETS, _TIMES = 13, 2, 2


@dataclass(frozen=True)
class Rates:
    """FLOP/s, each with the share of it that a phase reaches.

    Attributes:
        worker: of a worker in matrix products.
        reducer: of the reducer in products of float64, with all its threads.
        shares: phase -> share of its rate.
    """

    worker: float
    reducer: float
    shares: dict[str, float]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the benchmark and return its rows, one a shape and number of edits."""
    arguments = _parse(argv)
    link = arguments.gigabits * 1e9 / 8
    rows = []
    for name in arguments.shapes:
        rates = _rates(arguments, name)
        for edits in arguments.edits:
            costs = shape_costs(SHAPES[name], edits, rates, arguments.steps, arguments.shard_size)
            row = {
                "shape": name,
                "edits": edits,
                "steps": arguments.steps,
                "worker_teraflops": rates.worker / 1e12,
                "reducer_gigaflops": rates.reducer / 1e9,
                "gigabits": arguments.gigabits,
                **_shown(name, edits, costs, link),
            }
            append_row("scaling_shapes", {**describe_machine(), **row}, arguments.results)
            rows.append(row)
    return rows


def shape_costs(
    shape: Shape, edits: int, rates: Rates, steps: float, shard_size: int | str = "auto"
) -> Costs:
    """What a batch of edits costs one worker on a model of a shape.

    Args:
        shape: the model's.
        edits: how many.
        rates: of workers and the reducer.
        steps: that a value search takes.
        shard_size: as of `cluster.shard_size`.
    """
    model = _outline(shape)
    size, sample = ModelSize.of(model), random_edits(_SAMPLE, model.vocab_size)
    shards = cut_shards(range(edits), shard_size)  # type: ignore[arg-type]
    counts = [len(shard.items) for shard in shards]
    last, each = shape.layers[-1], 1 / len(sample)
    of_value = value_flops(size, sample, [steps] * len(sample), last) * each
    of_key = key_flops(size, sample, shape.layers) * each / len(shape.layers)
    d = model.hidden_size

    def seconds(flops: float, pieces: Sequence[int], phase: str) -> list[float]:
        rate = rates.worker * rates.shares[phase]
        return [n * flops / rate + CALL_SECONDS["ray"] for n in pieces]

    layers = []
    for layer in shape.layers:
        f = model.key_size(layer)
        groups = groups_of(shards, f)
        layers.append(
            LayerCosts(
                keys=seconds(of_key, counts, "keys"),
                apply=2.0 * min(edits, f) * f * d / (rates.worker * rates.shares["merge"] / 2),
                update=update_bytes(edits, f, d),
                **_merging(edits, f, d, [sum(counts[i] for i in group) for group in groups],
                           len(groups) < len(shards), rates),
            )
        )  # fmt: skip
    asked = edits * _PROBES
    probes = [len(s.items) for s in cut_shards(range(asked), probe_shard_size(asked))] * _TIMES
    scored = seconds(_probe_flops(size, sample), probes, "scoring")
    return Costs(
        {"values": seconds(of_value, counts, "values"), "evaluation": scored},
        layers,
        DRIVER_SECONDS,
    )


def _merging(
    edits: int, f: int, d: int, groups: Sequence[int], in_tree: bool, rates: Rates
) -> dict[str, Any]:
    """The reducer's part of a layer: alone, or after sums that are formed all over the cluster."""
    rate = rates.reducer * rates.shares["merge"]
    alone = reduce_flops(edits, f, d) + (factor_flops(f, has_basis=False) if edits < f else 0.0)
    if not in_tree:
        return {"merge": alone / rate, "inward": edits * (f + d) * _FLOAT}
    of_edit = 2.0 * f * (f + d)
    sums, levels = (f + d) * f * _DOUBLE, 0
    left = len(groups)
    while left > FAN_IN:
        left, levels = -(-left // FAN_IN), levels + 1
    return {
        "merge": (alone - of_edit * edits) / rate,
        "sums": [n * of_edit / rate for n in groups],
        # A group's keys enter one node, then eight sums a level enter another.
        "inward": max(groups) * (f + d) * _FLOAT + (levels * FAN_IN + left) * sums,
    }


def _probe_flops(size: ModelSize, sample: Sequence[EditPrompts]) -> float:
    """FLOP of scoring one probe; its prompt is as long as a bare rewrite, and runs once."""
    prompt = sum(len(edit.rewrites[0].ids) for edit in sample) / len(sample)
    target = sum(len(edit.target) for edit in sample) / len(sample)
    read = _TARGETS * target
    return scoring_flops(size, prompt + read - _TARGETS, read)


def _outline(shape: Shape) -> ModelOutline:
    with torch.device("meta"):
        return ModelOutline(AutoModelForCausalLM.from_config(shape.config()))


def _shown(name: str, edits: int, costs: Costs, link: float) -> dict[str, Any]:
    """Print a job's tables; return their figures."""
    found: dict[str, Any] = {}
    lines: list[tuple[Any, ...]] = []
    for phase in (*costs.phases, "all"):
        parts = {
            w: costs.all_parts(w, link) if phase == "all" else costs.parts(phase, w, link)
            for w in WORKERS
        }
        shares = {w: efficiency(parts[1], parts[w], w) for w in WORKERS}
        lines.append((phase, *(parts[w].total() for w in WORKERS)))
        lines.append(("  efficiency", *(shares[w] for w in WORKERS)))
        for workers in WORKERS:
            found[f"{phase}_seconds_{workers}"] = parts[workers].total()
            found[f"{phase}_efficiency_{workers}"] = shares[workers]
        below = next((w for w in WORKERS if shares[w] < GOAL), None)
        found[f"{phase}_below_goal"] = below
        found[f"{phase}_because"] = None if below is None else largest_loss(parts[below])
    print_table(
        f"{name}, {edits:,} edits: seconds by workers", ("phase", *map(str, WORKERS)), lines
    )
    spent = {w: costs.all_parts(w, link) for w in SHOWN}
    print_table(
        "where the workers' time goes, shares by workers",
        ("what", *map(str, SHOWN)),
        [(PARTS[what], *(spent[w][what] / spent[w].total() for w in SHOWN)) for what in PARTS],
    )
    for phase in (*costs.phases, "all"):
        below, why = found[f"{phase}_below_goal"], found[f"{phase}_because"]
        said = "at no number of these" if below is None else f"from {below} on: {why}"
        print(f"{phase}: efficiency below {GOAL:.0%} {said}")
    return {**found, **{f"{what}_share_{w}": spent[w][what] / spent[w].total()
                        for w in SHOWN for what in PARTS if what != EVEN}}  # fmt: skip


def _rates(arguments: argparse.Namespace, shape: str) -> Rates:
    """Those that are given, or those of the last row of `--measured` for the shape."""
    given = Rates(arguments.teraflops * 1e12, arguments.reducer_gflops * 1e9, dict(EFFICIENCY))
    if arguments.measured is None:
        return given
    table = pq.read_table(arguments.measured)
    rows = [row for row in table.to_pylist() if row["shape"] == shape and row["gpu"]]
    if not rows:
        raise SystemExit(f"{arguments.measured}: no row of {shape} on a GPU")
    row = rows[-1]
    measured = {phase: row.get(f"{phase}_share") for phase in ("values", "keys")}
    shares = given.shares | {name: share for name, share in measured.items() if share is not None}
    return replace(given, worker=row["matmul_teraflops_per_second"] * 1e12, shares=shares)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--shapes", nargs="+", choices=SHAPES, default=["gpt-j-6b", "llama-3-8b"])
    made.add_argument("--edits", nargs="+", type=int, default=[10_000, 1_000_000])
    made.add_argument("--teraflops", type=float, default=400.0, help="TFLOP/s of a worker")
    made.add_argument("--measured", type=Path, help="results of benchmarks.gpu; else --teraflops")
    made.add_argument(
        "--reducer-gflops",
        type=float,
        default=90.0,
        help="GFLOP/s of the reducer in float64, all threads",
    )
    made.add_argument("--steps", type=float, default=25.0, help="steps of a value search")
    made.add_argument("--shard-size", default="auto", type=_size, help="requests a shard")
    made.add_argument("--gigabits", type=float, default=10.0, help="a link's Gbit/s")
    made.add_argument("--results", type=Path, default=RESULTS)
    return made.parse_args(argv)


def _size(text: str) -> int | str:
    return text if text == "auto" else int(text)


if __name__ == "__main__":
    main()
