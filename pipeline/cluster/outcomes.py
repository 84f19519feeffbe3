"""From the outcome of a shard to the rows of its part, and to the requests that have none."""

import functools

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.cluster.scheduler import Outcome
from pipeline.cluster.shards import Shard
from pipeline.results.listing import TableKind
from pipeline.results.schemas import SCHEMAS
from pipeline.results.store import RunStore


def shards_left(store: RunStore, kind: TableKind, round: int, shards: list[Shard]) -> list[Shard]:
    """The shards whose part the run does not hold."""
    return [shard for shard in shards if not store.has_part(kind, round, shard.index)]


def num_items(shards: list[Shard]) -> int:
    """Items of all shards together."""
    return sum(len(shard.items) for shard in shards)


def rows_of(kind: TableKind, outcome: Outcome) -> pa.Table:
    """The rows of the pieces that worked, in the shard's order."""
    return pa.concat_tables(
        [SCHEMAS[kind].empty_table(), *(piece.result for piece in outcome.done)]
    )


def rows_and_failures(kind: TableKind, outcome: Outcome) -> tuple[pa.Table, dict[str, str]]:
    """The rows of pieces whose result is (rows, case_id -> why not), and why others have none."""
    tables = [SCHEMAS[kind].empty_table()]
    failed: dict[str, str] = {}
    for piece in outcome.done:
        rows, without = piece.result
        tables.append(rows)
        failed |= without
    failed |= {request.case_id: reason for request, reason in outcome.failures}
    return pa.concat_tables(tables), failed


def finite_values(outcome: Outcome) -> tuple[pa.Table, dict[str, str]]:
    """The values that are finite, and case_id -> reason of the requests that have none."""
    failed = {request.case_id: reason for request, reason in outcome.failures}
    rows = rows_of("values", outcome)
    measures = ("loss", "initial_norm", "delta_norm")
    is_finite = functools.reduce(pc.and_, (pc.is_finite(rows[name]) for name in measures))
    infinite = rows.filter(pc.invert(is_finite))["case_id"].to_pylist()
    reason = "the value search ran into an infinity or NaN"
    return rows.filter(is_finite), failed | dict.fromkeys(infinite, reason)


def failed_probes(outcome: Outcome) -> dict[str, str]:
    """case_id -> why its last failing probe failed, whatever order they failed in."""
    failures = sorted(outcome.failures, key=lambda failure: (failure[0].kind, failure[0].index))
    return {probe.case_id: f"{probe.kind} probe {probe.index}: {why}" for probe, why in failures}
