"""A plan for people: what is edited, and what it is estimated to take."""

from collections import Counter
from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.cluster.plan import Plan
from pipeline.planning.memory import BASE_BYTES
from pipeline.printable import one_line
from pipeline.results.planned import Estimate, Memory, PlannedTraining


def plan_tables(plan: Plan, estimate: Estimate) -> RenderableType:
    """Requests, shards, seconds by workers, memory and bytes moved."""
    return Group(
        *map(said, _lines(plan, estimate)),
        _seconds(estimate),
        memory_table(estimate.memory),
        _moved(estimate),
    )


def comparison_seconds(estimates: Mapping[str, Estimate]) -> Table:
    """What studies take side by side: at most as long as one after another.

    Args:
        estimates: of every study, by its name; all for the same numbers of workers.
    """
    counts = list(next(iter(estimates.values())).seconds)
    shared = {
        workers: {
            phase: max(found.seconds[workers].get(phase, 0.0) for found in estimates.values())
            for phase in _SHARED
        }
        for workers in counts
    }
    own = {
        name: {
            workers: sum(s for phase, s in found.seconds[workers].items() if phase not in _SHARED)
            for workers in counts
        }
        for name, found in estimates.items()
    }
    table = Table()
    table.add_column("study")
    for workers in counts:
        table.add_column(str(workers), justify="right")
    for phase in _SHARED:
        table.add_row(f"{phase}, once", *(number(shared[workers][phase]) for workers in counts))
    for name, seconds in own.items():
        table.add_row(one_line(name), *(number(seconds[workers]) for workers in counts))
    table.add_section()
    totals = [
        sum(shared[workers].values()) + sum(seconds[workers] for seconds in own.values())
        for workers in counts
    ]
    table.add_row("all", *map(number, totals))
    return table


_SHARED = ("start", "covariance", "baseline")


def shortage(memory: Memory, worker_bytes: float) -> str | None:
    """What is wrong where a worker has less memory than it needs; None where it has enough.

    Args:
        memory: the estimate.
        worker_bytes: what a worker has, or each of its GPUs, where it has several.
    """
    if memory.gpu:
        return _gpu_shortage(memory, worker_bytes)
    need, weights = memory.worker_bytes, memory.worker["weights"]
    if need <= worker_bytes:
        return None
    has = f"a worker has {_size(worker_bytes)}"
    if weights + BASE_BYTES > worker_bytes:
        return (
            f"the model is larger than a worker's memory: its weights take {_size(weights)}, {has};"
            " take fewer workers a machine, a smaller model.dtype, more cluster.gpus_per_worker, or"
            " larger machines"
        )
    return (
        f"a worker needs about {_size(need)}, {has}; take fewer workers a machine, or lower"
        f" {_LOWER['job' if _VALUES in memory.worker else 'training']}"
    )


_VALUES = "activations of a value batch"
_LOWER = {
    "job": "cluster.value_batch_size or cluster.hidden_states_gb",
    "training": "train.batch_size, train.max_tokens or the sizes of the editor",
}


def _gpu_shortage(memory: Memory, gpu_bytes: float) -> str | None:
    if memory.gpu_bytes <= gpu_bytes:
        return None
    return (
        f"the fullest GPU of a worker needs about {_size(memory.gpu_bytes)}, of those"
        f" {_size(memory.gpu['weights'])} for weights, and has {_size(gpu_bytes)}; take more"
        " cluster.gpus_per_worker, or lower cluster.value_batch_size or cluster.hidden_states_gb"
    )


def _lines(plan: Plan, estimate: Estimate) -> Iterator[str]:
    statuses = Counter(row.status for row in plan.rows)
    counts = ", ".join(f"{statuses[s]} {s}" for s in ("accepted", "rejected", "conflict"))
    use = f"{plan.num_requests} to edit"
    if (training := estimate.training) is not None:
        use = f"{training.learnt} to train on, {training.held} to measure on"
    yield f"requests: {len(plan.rows)} read: {counts}; {use}"
    for row in [row for row in plan.rows if row.status != "accepted"][:_MOST_PROBLEMS]:
        yield f"  {row.status}: {' '.join(row.reason.split())}"
    if estimate.training is not None:
        yield from _of_training(plan, estimate.training)
    else:
        yield _of_shards(plan)
    is_measured = estimate.rate_source == "measured"
    source = "measured on this machine's processors as busy as they are" if is_measured else "given"
    rate = f"rate of a worker: {estimate.rate / 1e9:.4g} GFLOP/s in matrix products ({source})"
    if estimate.training is None:
        rate += f"; {estimate.steps:.3g} of {plan.spec.method.value.steps} steps an edit"
    yield rate


_MOST_PROBLEMS = 5


def _of_shards(plan: Plan) -> str:
    rounds = plan.rounds.shards
    largest = max(len(shard.items) for shard in plan.shards)
    layers = ", ".join(map(str, plan.layers))
    return (
        f"shards: {len(plan.shards)} of at most {largest} requests, in {len(rounds)}"
        f" round{'s' * (len(rounds) > 1)}; {plan.spec.method.name} at layers {layers}"
    )


def _of_training(plan: Plan, training: PlannedTraining) -> Iterator[str]:
    method, train = plan.spec.method, plan.spec.train
    assert train is not None
    where = "" if method.is_memory else f" at layers {', '.join(map(str, plan.layers))}"
    yield (
        f"training: {method.name}{where}, {training.parameters:,} parameters;"
        f" {train.steps} steps at most; batch_size {train.batch_size}, accumulate"
        f" {train.accumulate}; {training.measurements} measurements"
    )
    yield (
        f"a step gives workers {_size(training.step_out)}, the same for all, and returns"
        f" {_size(training.step_back)}"
    )


def _seconds(estimate: Estimate) -> Table:
    table = Table(title="seconds, estimated, by workers", title_justify="left")
    table.add_column("phase")
    for workers in estimate.seconds:
        table.add_column(str(workers), justify="right")
    phases = list(next(iter(estimate.seconds.values())))
    for phase in phases:
        name = "covariance, if not there yet" if phase == "covariance" else phase
        table.add_row(name, *(number(found[phase]) for found in estimate.seconds.values()))
    table.add_section()
    totals = {workers: sum(found.values()) for workers, found in estimate.seconds.items()}
    table.add_row("all", *map(number, totals.values()))
    return table


def memory_table(memory: Memory) -> Table:
    """Bytes of a worker, the reducer and the driver, by what they are for."""
    table = Table(title="memory, estimated", title_justify="left")
    table.add_column("what")
    columns = {
        "worker": memory.worker,
        "its fullest GPU": memory.gpu,
        "reducer": memory.reducer,
        "driver": memory.driver,
    }
    if not memory.gpu:
        del columns["its fullest GPU"]
    for name in columns:
        table.add_column(name, justify="right")
    parts = list(columns.values())
    for what in dict.fromkeys(name for part in parts for name in part):
        table.add_row(what, *(_size(part[what]) if what in part else "" for part in parts))
    table.add_section()
    on_gpu = [memory.gpu_bytes] if memory.gpu else []
    totals = (memory.worker_bytes, *on_gpu, memory.reducer_bytes, memory.driver_bytes)
    table.add_row("at its peak", *map(_size, totals))
    return table


def _moved(estimate: Estimate) -> Table:
    table = Table(title="bytes, estimated", title_justify="left")
    table.add_column("what")
    table.add_column("moved between processes", justify="right")
    for what, size in estimate.moved.model_dump().items():
        if size:
            table.add_row(what, _size(size))
    table.add_section()
    if estimate.training is not None:
        for kind in ("checkpoint", "editor"):
            table.add_row(f"{kind}, on disk", _size(estimate.stored[kind]))
    table.add_row("run directory", _size(sum(estimate.stored.values())))
    return table


def said(line: str) -> Text:
    """A line of text with nothing in it that a terminal would act on."""
    return Text(one_line(line))


def number(seconds: float) -> str:
    """Seconds with as many digits as an estimate deserves."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}"


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
