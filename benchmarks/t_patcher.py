"""T-Patcher: seconds an edit, one by one and side by side, and what its memory of queries takes.

    python -m benchmarks.t_patcher --model MODEL --requests COUNTERFACT.json --corpus CORPUS.json

Edits one by one are a study of one edit a round, each on the model that the one before left, whose
queries it remembers too. Side by side are the pieces of a batch. Resident memory beyond the one
matrix of queries tells whether an edit copies it.
"""

import argparse
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import print_goals, report
from benchmarks.timing import timed_run
from benchmarks.workload import Workload, parser
from pipeline.editing.patches import PatchSettings
from pipeline.editing.patching import PatchedEdit, QueryMemory, train_patches
from pipeline.editing.queries import ffn_queries
from pipeline.editing.update import EditedWeights
from pipeline.methods import AdapterMethod
from pipeline.prompts import EditPrompts, token_ids, tokenize_edits
from pipeline.sources.corpus import read_corpus

GOAL_SECONDS = 3.0
GOAL_SHARE_OF_MEMORY = 1.0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    work = Workload.of(arguments)
    model, layer = work.model, work.model.num_blocks - 1
    edits = tokenize_edits(work.tokenizer, work.requests, ("{}",))
    queries = _queries(work, arguments, layer)
    settings, weights = PatchSettings(steps=arguments.steps), EditedWeights(model, (layer,))

    def train(some: Sequence[EditPrompts]) -> list[PatchedEdit]:
        before = [adapter.parts["queries"] for _, adapter in weights.adapters]
        split = min(arguments.queries, len(queries) * 10 // 11)
        memory = QueryMemory((queries[:split], *before), (queries[split:],))
        seeds = list(range(len(some)))
        return train_patches(model, layer, some, memory, settings, seeds, work.max_tokens)

    piece = AdapterMethod.edits_of_a_piece
    beside: list[float] = []
    found: list[PatchedEdit] = []
    train(edits[:1])  # warms up
    peak = 0
    for start in range(0, len(edits), piece):
        some = edits[start : start + piece]
        run = timed_run(lambda some=some: train(some), arguments.clock)  # type: ignore[misc]
        beside += [run.seconds / len(some)] * len(some)
        found += run.result
        peak = max(peak, run.peak_bytes)
    alone: list[float] = []
    peak_alone = 0
    for edit in edits[: arguments.alone]:
        run = timed_run(lambda edit=edit: train([edit]), arguments.clock)  # type: ignore[misc]
        alone.append(run.seconds)
        peak_alone = max(peak_alone, run.peak_bytes)
        weights.apply(layer, run.result[0].bank)
    matrix = queries.numel() * queries.element_size()
    row: dict[str, Any] = {
        "dtype": work.spec.model.dtype,
        "clock": arguments.clock,
        "edits": len(edits),
        "queries": len(queries),
        "queries_megabytes": matrix / 1e6,
        "seconds_alone": median(alone),
        "seconds_beside": median(beside),
        "steps": median(edit.steps for edit in found),
        "most_steps": max(edit.steps for edit in found),
        "patches_an_edit": sum(edit.bank.num_neurons for edit in found) / len(found),
        "target_probability": median(edit.target_probability for edit in found),
        "peak_megabytes": peak / 1e6,
        "peak_megabytes_alone": peak_alone / 1e6,
        "peak_share_alone": peak_alone / matrix,
    }
    report("t_patcher", row, arguments.results)
    print_goals(
        {
            "seconds an edit, one by one": (row["seconds_alone"], "<=", GOAL_SECONDS),
            "memory beside the queries, in theirs": (
                row["peak_share_alone"],
                "<=",
                GOAL_SHARE_OF_MEMORY,
            ),
        }
    )
    return row


def _queries(work: Workload, arguments: argparse.Namespace, layer: int) -> Tensor:
    """So many queries of the corpus's first texts, and a tenth as many to watch."""
    wanted, rows, count = arguments.queries + arguments.queries // 10, [], 0
    limit = work.model.max_positions
    for ids in token_ids(
        work.tokenizer, read_corpus(arguments.corpus, field="text", samples=None, seed=0)
    ):
        rows.append(ids[:limit])
        count += max(0, len(rows[-1]) - 1)
        if count >= wanted:
            break
    found = ffn_queries(work.model, layer, [row for row in rows if row], work.max_tokens)
    return found[:wanted].to(work.device, torch.float32)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser("T-Patcher's seconds an edit, and its memory of queries.", edits=48)
    made.add_argument("--corpus", required=True, help="texts whose queries are remembered")
    made.add_argument("--queries", type=int, default=40_000, help="remembered queries")
    made.add_argument("--steps", type=int, default=2000, help="steps of an edit at most")
    made.add_argument("--alone", type=int, default=16, help="edits that are also made one by one")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
