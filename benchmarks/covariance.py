"""Covariance sums of all edited layers against one forward pass plus the Gram products.

    python -m benchmarks.covariance --model MODEL --requests COUNTERFACT.json --corpus CORPUS.json \
        --layers 0 1 2 3 4

The reference runs the same batches from the embeddings through the last edited layer and then the
products K^T K of keys that lie ready, each added up in float64. The plain way runs the model once a
layer over texts in the corpus's order, 16 at a time, as the code published with MEMIT does.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import print_goals, print_table, report
from benchmarks.timing import Timed, alternate
from benchmarks.workload import Workload, parser, run_up_to
from pipeline.editing.batching import TokenBatch, make_batch, token_batches
from pipeline.editing.covariance import GramSums, gram_sums
from pipeline.editing.keys import inputs_of
from pipeline.models.editable import EditableModel
from pipeline.planning.flops import ModelSize, covariance_flops
from pipeline.sources.corpus import read_corpus

GOAL_RATIO = 1.3
_PLAIN_TEXTS = 16


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    work = Workload.of(arguments)
    model, layers = work.model, work.layers
    rows = _rows(work, arguments)
    batches = list(token_batches(model, rows, work.max_tokens))
    keys = _ready_keys(model, layers, batches[len(batches) // 2])
    timed = alternate(
        {
            "one pass": lambda: gram_sums(model, layers, rows, work.max_tokens),
            "forward pass": lambda: run_up_to(model, layers[-1], batches),
            "Gram products": lambda: _products(keys, sum(len(row) for row in rows)),
            "plain": lambda: plain_sums(work.plain_model, layers, rows),
        },
        arguments.repeats,
        arguments.clock,
    )
    sums: GramSums = timed["one pass"].result
    floor = timed["forward pass"].seconds + timed["Gram products"].seconds
    sizes = [model.key_size(layer) for layer in layers]
    flops = covariance_flops(ModelSize.of(model), sizes, sums.tokens, layers[-1])
    row: dict[str, Any] = {
        "dtype": work.spec.model.dtype,
        "clock": arguments.clock,
        "texts": len(rows),
        "tokens": sums.tokens,
        "layers": len(layers),
        "tokens_per_second": sums.tokens / timed["one pass"].seconds,
        "gigaflops_per_second": flops / timed["one pass"].seconds / 1e9,
        "padding_share": 1.0 - sums.tokens / sum(batch.ids.numel() for batch in batches),
        "floor_ratio": timed["one pass"].seconds / floor,
        "plain_ratio": timed["plain"].seconds / timed["one pass"].seconds,
        "peak_megabytes": timed["one pass"].peak_bytes / 1e6,
        "bytes_a_layer": 8 * sizes[-1] ** 2,
        "largest_difference": _difference(sums, timed["plain"].result),
    }
    _print_ways(timed, sums.tokens, floor, arguments.repeats)
    _print_growth(work, rows, arguments)
    report("covariance", row, arguments.results)
    print_goals({"times forward pass + Gram": (row["floor_ratio"], "<=", GOAL_RATIO)})
    return row


@torch.no_grad()
def plain_sums(
    model: EditableModel, layers: Sequence[int], rows: Sequence[Sequence[int]]
) -> GramSums:
    """The same sums by a pass a layer, texts in their order."""
    sums = {}
    for layer in layers:
        size = model.key_size(layer)
        total = torch.zeros(size, size, dtype=torch.float64, device=model.input_device)
        for start in range(0, len(rows), _PLAIN_TEXTS):
            index = range(start, min(start + _PLAIN_TEXTS, len(rows)))
            batch = make_batch(model, rows, index)
            keys = _ready_keys(model, [layer], batch)[layer]
            total += keys.T @ keys
        sums[layer] = total.cpu()
    return GramSums(sums, sum(len(row) for row in rows))


@torch.no_grad()
def _ready_keys(
    model: EditableModel, layers: Sequence[int], batch: TokenBatch
) -> dict[int, Tensor]:
    """Layer -> keys of one batch's real tokens, (tokens, f) float32, by a pass a layer."""
    found = {}
    for layer in layers:
        with inputs_of(model.down_projection(layer)) as seen:
            run_up_to(model, layer, [batch])
        keys = seen[0].view(*batch.ids.shape, -1)
        found[layer] = keys[batch.real].float()
    return found


def _products(keys: dict[int, Tensor], tokens: int) -> None:
    """As many Gram products as `tokens` tokens of every layer take, added up in float64."""
    for some in keys.values():
        total = torch.zeros(some.shape[1], some.shape[1], dtype=torch.float64, device=some.device)
        for start in range(0, tokens, len(some)):
            part = some[: tokens - start]
            total += part.T @ part


def _difference(found: GramSums, expected: GramSums) -> float:
    assert found.tokens == expected.tokens
    return max(
        float((gram - expected.sums[layer]).norm() / expected.sums[layer].norm())
        for layer, gram in found.sums.items()
    )


def _print_ways(timed: dict[str, Timed], tokens: int, floor: float, repeats: int) -> None:
    print_table(
        f"covariance, {tokens:,} tokens: medians of {repeats} rounds",
        ("way", "seconds", "tokens/s", "of forward pass + Gram", "peak MB"),
        [
            (name, run.seconds, tokens / run.seconds, run.seconds / floor, run.peak_bytes / 1e6)
            for name, run in timed.items()
        ],
    )


def _print_growth(
    work: Workload, rows: Sequence[Sequence[int]], arguments: argparse.Namespace
) -> None:
    """How the cost grows with the number of layers: the last 1, 2, ... of them."""
    counts = range(1, len(work.layers) + 1)
    timed = alternate(
        {
            str(count): partial(gram_sums, work.model, work.layers[-count:], rows, work.max_tokens)
            for count in counts
        },
        arguments.repeats,
        arguments.clock,
    )
    print_table(
        "how the cost grows with the layers",
        ("layers", "seconds", "tokens/s", "peak MB"),
        [
            (name, run.seconds, run.result.tokens / run.seconds, run.peak_bytes / 1e6)
            for name, run in timed.items()
        ],
    )


def _rows(work: Workload, arguments: argparse.Namespace) -> list[list[int]]:
    texts = read_corpus(
        arguments.corpus, field="text", samples=arguments.texts, seed=work.spec.seed
    )
    limit = min(n for n in (arguments.max_text_tokens, work.model.max_positions) if n is not None)
    return [ids[:limit] for ids in work.tokenizer(texts)["input_ids"] if ids]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__.splitlines()[0], edits=1)
    made.add_argument("--corpus", required=True, help="text, .json, .jsonl, .parquet, or factworld")
    made.add_argument("--texts", type=int, default=1000)
    made.add_argument("--max-text-tokens", type=int, default=512)
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
