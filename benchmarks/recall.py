"""Recall from an edit memory: exact and through the index, by the number of edits it holds.

    python -m benchmarks.recall --sizes 100 1000 10000 100000

Embeddings are drawn around cluster centres, as relations and phrasings make them; queries are
edits moved by less than the scope's radius, so that each has a right answer. Build time is that of
adding all edits in pieces, and with the index of the first recall, in which it takes them in.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, print_table, report
from benchmarks.timing import CLOCKS, alternate, timed_run
from pipeline.editing.serac.index import InvertedFile
from pipeline.editing.serac.memory import EditMemory, MemoryEntry

_PIECE = 1000
_RADIUS = 0.5  # of the squared distance; a query is in scope up to ln 2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return its row."""
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    rows: list[Sequence[Any]] = []
    found: dict[str, Any] = {}
    for size in arguments.sizes:
        one = _measure(size, arguments)
        rows.append((size, *one.values()))
        found |= {f"{name}_{size}": value for name, value in one.items()}
    head = ("edits", "exact ms a query", "index ms a query", "ratio", "found by the index")
    print_table("recall", (*head, "exact build s", "index build s"), rows)
    row = {"queries": arguments.queries, "width": arguments.width, **found}
    report("recall", row, arguments.results)
    return row


def _measure(size: int, arguments: argparse.Namespace) -> dict[str, float | None]:
    embeddings, queries = _draw(size, arguments.queries, arguments.width)
    memories = {"exact": EditMemory(arguments.width)}
    if find_spec("faiss") is not None:
        first = min(size, arguments.exact_below)
        index = InvertedFile(arguments.width, exact_below=first, probes=arguments.probes)
        memories["index"] = EditMemory(arguments.width, index=index)
    build = {
        name: timed_run(lambda memory=memory: _fill(memory, embeddings), arguments.clock).seconds  # type: ignore[misc]
        for name, memory in memories.items()
    }
    runs = {name: lambda memory=memory: memory.recall(queries) for name, memory in memories.items()}
    timed = alternate(runs, arguments.repeats, arguments.clock)
    of_query = {name: 1e3 * run.seconds / len(queries) for name, run in timed.items()}
    exact = timed["exact"].result.entries
    same = None
    if "index" in timed:
        pairs = zip(exact, timed["index"].result.entries, strict=True)
        same = sum(one == other for one, other in pairs) / len(exact)
    return {
        "exact_ms": of_query["exact"],
        "index_ms": of_query.get("index"),
        "ratio": of_query["exact"] / of_query["index"] if "index" in timed else None,
        "found": same,
        "exact_build": build["exact"],
        "index_build": build.get("index"),
    }


def _draw(size: int, queries: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(200, width, generator=generator)
    of = torch.randint(0, len(centres), (size,), generator=generator)
    embeddings = centres[of] + 0.5 * torch.randn(size, width, generator=generator)
    asked = torch.randint(0, size, (queries,), generator=generator)
    away = torch.randn(queries, width, generator=generator)
    moved = away * (_RADIUS / away.square().sum(dim=1, keepdim=True)).sqrt()
    return embeddings, embeddings[asked] + moved


def _fill(memory: EditMemory, embeddings: Tensor) -> None:
    for start in range(0, len(embeddings), _PIECE):
        some = embeddings[start : start + _PIECE]
        entries = [MemoryEntry(f"{start + i}", "prompt", "target") for i in range(len(some))]
        memory.add(entries, some)
    memory.recall(embeddings[:1])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--exact-below", type=int, default=20_000)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
