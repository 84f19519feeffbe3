"""A survey's plan for people: the seconds that each of its cells is estimated to take, and all."""

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table

from pipeline.planning.job import Cells
from pipeline.planning.memory import largest_memory
from pipeline.report.plan import memory_table, number, said
from pipeline.results.planned import Estimate

SHARED = ("start", "covariance")
"""Phases that the cells of a model have in common: its workers are started once."""


def survey_tables(cells: Cells) -> RenderableType:
    """Seconds of every cell with the spec's workers, of all cells by workers, and memory.

    Args:
        cells: estimates are all for the same numbers of workers.
    """
    estimates = [estimate for _, estimate in cells if estimate is not None]
    return Group(
        *map(said, _impossible(cells)),
        _cells(cells, next(iter(estimates[0].seconds))),
        _all(cells),
        memory_table(largest_memory([one.memory for one in estimates])),
    )


def own_seconds(estimate: Estimate, workers: int) -> float:
    """What a cell takes beside what a model's cells share."""
    phases = estimate.seconds[workers]
    return sum(seconds for phase, seconds in phases.items() if phase not in SHARED)


def shared_seconds(cells: Cells, workers: int) -> dict[str, float]:
    """Phase -> seconds of what is made once for all cells of a model, over all models."""
    of_model: dict[str, dict[str, float]] = {}
    for entry, estimate in cells:
        if estimate is not None:
            longest = of_model.setdefault(entry.cell.model, dict.fromkeys(SHARED, 0.0))
            for phase in SHARED:
                longest[phase] = max(longest[phase], estimate.seconds[workers].get(phase, 0.0))
    return {phase: sum(found[phase] for found in of_model.values()) for phase in SHARED}


def _impossible(cells: Cells) -> Iterator[str]:
    """A line for every editor and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry, estimate in cells:
        if estimate is None:
            cell = entry.cell
            editor = "/".join((cell.model, cell.dataset, cell.editor))
            sizes = [f"{cell.kind} {size}" for size in cell.sizes]
            found.setdefault((editor, str(entry.reason)), []).extend(sizes)
    for (editor, reason), sizes in found.items():
        yield f"impossible: {editor}, {', '.join(sizes)}: {reason}"


def _cells(cells: Cells, workers: int) -> Table:
    names = list(dict.fromkeys(entry.cell.name for entry, _ in cells))
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for entry, estimate in cells:
        cell = entry.cell
        row = rows.setdefault((cell.model, cell.dataset, cell.editor), {})
        if estimate is not None:
            row[cell.name] = own_seconds(estimate, workers)
    title = f"seconds, estimated, with {workers} worker{'s' * (workers > 1)}"
    table = Table(title=title, title_justify="left")
    for name in ("model", "data set", "editor"):
        table.add_column(name)
    for name in (*names, "all"):
        table.add_column(name, justify="right")
    for key, row in rows.items():
        given = [number(row[name]) if name in row else "-" for name in names]
        table.add_row(*map(said, key), *given, number(sum(row.values())))
    return table


def _all(cells: Cells) -> Table:
    table = Table(title="seconds of all cells, at most, by workers", title_justify="left")
    table.add_column("what")
    estimates = [estimate for _, estimate in cells if estimate is not None]
    counts = list(estimates[0].seconds)
    for workers in counts:
        table.add_column(str(workers), justify="right")
    shared = {workers: shared_seconds(cells, workers) for workers in counts}
    own = {workers: sum(own_seconds(one, workers) for one in estimates) for workers in counts}
    rows: Mapping[str, list[float]] = {
        **{f"{phase}, once a model": [shared[n][phase] for n in counts] for phase in SHARED},
        f"{len(estimates)} cells": [own[n] for n in counts],
    }
    for name, seconds in rows.items():
        table.add_row(name, *map(number, seconds))
    table.add_section()
    table.add_row("all", *map(number, map(sum, zip(*rows.values(), strict=True))))
    return table
