"""How long a job takes, what it holds in memory and what it moves: an estimate before it runs."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.cluster.plan import Plan
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.cluster.tree import groups_of
from pipeline.errors import InputError
from pipeline.methods import build_adapter_method, build_gradient_method
from pipeline.models.editable import resolve_device
from pipeline.models.loading import load_tokenizer
from pipeline.planning.edit_memory import EditMemorySize
from pipeline.planning.efficiency import (
    CALL_SECONDS,
    DOUBLE_SHARE,
    EFFICIENCY,
    LOAD_BYTES_PER_SECOND,
    MERGE_THREADS,
    START_SECONDS,
)
from pipeline.planning.memory import batch_size, estimate_memory, local_workers, update_bytes
from pipeline.planning.outline import ModelOutline, outline
from pipeline.planning.rates import crossing_seconds, makespan, rate_as_busy
from pipeline.planning.training_estimate import estimate_training
from pipeline.planning.work import Pieces, Work, count_work, expected_steps, sample_edits
from pipeline.prompts import EditPrompts
from pipeline.results.planned import Estimate, Transfer
from pipeline.spec import JobSpec, ModelSpec

WORKERS = (1, 8, 64)
Shapes = tuple[ModelOutline, PreTrainedTokenizerBase]


def make_estimate(
    plan: Plan,
    *,
    rate: float | None = None,
    reducer_rate: float | None = None,
    steps: float | None = None,
    gigabits: float = 10.0,
    workers: Sequence[int] = WORKERS,
    shapes: Callable[[ModelSpec, torch.device], Shapes] | None = None,
) -> Estimate:
    """Estimate a job without its weights.

    Args:
        plan: the job.
        rate: FLOP/s of a worker in matrix products; null measures this machine for a second.
        reducer_rate: FLOP/s of the reducer in float64; null takes that of a worker's processors,
            which where workers have GPUs is far too much.
        steps: steps that an edit takes; null guesses where a stop loss ends searches early.
        gigabits: Gbit/s of a node's link.
        workers: numbers of workers to estimate for; the first one sets the memory.
        shapes: gives a model's outline and its tokenizer; null makes them.
    """
    spec, (device, _) = plan.spec, resolve_device()
    model, tokenizer = (shapes or _shapes)(spec.model, device)
    measured = rate is None
    if rate is None:
        rate = measured_rate(spec, device, model.dtype)
    source: Any = "measured" if measured else "given"
    link = gigabits * 1e9 / 8
    if spec.train is not None:
        if steps is not None:
            raise InputError("--steps: a training's are train.steps; give --set train.steps=N")
        given = plan, model, tokenizer, rate, reducer_rate, link, workers
        return Estimate(rate=rate, rate_source=source, **estimate_training(*given))
    edits = sample_edits(plan, tokenizer, model.answers)
    taken = expected_steps(spec) if steps is None else steps
    work = count_work(plan, model, tokenizer, edits, taken)
    if spec.method.is_locating:
        moved = _moved_in_locating(plan, model)
    elif spec.method.is_piecewise:
        moved = _moved_adapters(plan, model, edits)
    elif spec.method.is_memory:
        moved = _moved_memories(plan, model, edits)
    elif spec.method.is_closed_form:
        moved = _moved(plan, model, len(work.covariance.shards))
    else:
        moved = _moved_in_training(plan, model, edits, len(work.gradients))
    batch = batch_size(plan, device)
    return Estimate(
        rate=rate,
        rate_source=source,
        steps=taken,
        seconds={
            count: _seconds(plan, model, work, moved, rate, reducer_rate, count, link)
            for count in workers
        },
        moved=moved,
        stored=_stored(plan, model, edits),
        memory=estimate_memory(
            plan, model, edits, workers[0], batch, computes_covariance=bool(work.covariance.shards)
        ),
    )


def make_estimates(
    plans: Sequence[Plan],
    *,
    rate: float | None = None,
    reducer_rate: float | None = None,
    steps: float | None = None,
    gigabits: float = 10.0,
    workers: Sequence[int] = WORKERS,
) -> list[Estimate]:
    """Estimate studies for the same machine: a rate that is not given is measured once.

    Args: as of `make_estimate`.
    """
    first, *others = plans
    # The many plans of a survey are for few models.
    shapes = lru_cache(_shapes)
    found = make_estimate(
        first,
        rate=rate,
        reducer_rate=reducer_rate,
        steps=steps,
        gigabits=gigabits,
        workers=workers,
        shapes=shapes,
    )
    same: dict[str, Any] = {
        "rate": found.rate,
        "reducer_rate": reducer_rate,
        "steps": steps,
        "gigabits": gigabits,
        "workers": workers,
        "shapes": shapes,
    }
    source = {"rate_source": found.rate_source}
    return [found, *(make_estimate(plan, **same).model_copy(update=source) for plan in others)]


def worker_counts(spec: JobSpec) -> tuple[int, ...]:
    """The spec's own number of workers first (of this machine, for `auto`), then those of any."""
    if spec.cluster.engine == "in_process":
        return (1,)
    return tuple(dict.fromkeys((local_workers(spec), *WORKERS)))


def _shapes(spec: ModelSpec, device: torch.device) -> Shapes:
    return outline(spec, device=device), load_tokenizer(spec)


def measured_rate(spec: JobSpec, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s in matrix products, with a worker's threads, as busy as this machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(spec.cluster.cpus_per_worker)
    try:
        return rate_as_busy(device, dtype)
    finally:
        torch.set_num_threads(before)


def _seconds(
    plan: Plan,
    model: ModelOutline,
    work: Work,
    moved: Transfer,
    rate: float,
    reducer_rate: float | None,
    workers: int,
    bytes_per_second: float,
) -> dict[str, float]:
    """Phase -> seconds with so many workers, each on processors of its own."""

    rolls_back, a_call = plan.spec.rolls_back, CALL_SECONDS[plan.spec.cluster.engine]

    def phase(rounds: Sequence[Pieces], share: float) -> float:
        # Rounds that are rolled back do not wait for one another.
        together = (
            [sum((piece.shards for piece in rounds), ())]
            if rolls_back
            else [piece.shards for piece in rounds]
        )
        return sum(
            makespan([flops / (rate * share) + a_call for flops in shards], workers)
            for shards in together
        )

    if reducer_rate is None:
        threads = min(MERGE_THREADS, plan.spec.cluster.reducer_threads)
        reducer_rate = rate / plan.spec.cluster.cpus_per_worker * threads * DOUBLE_SHARE
    # Then every worker has a reducer of its own, and applies the updates of its own rounds.
    lanes = min(workers, len(plan.rounds.shards)) if rolls_back else 1
    merge = work.merge / (reducer_rate * EFFICIENCY["merge"]) / lanes
    apply = work.apply / (rate * DOUBLE_SHARE * EFFICIENCY["merge"]) / lanes
    crossing = crossing_seconds(moved.keys, moved.updates, workers, bytes_per_second)
    weights = model.num_parameters * model.dtype.itemsize
    found = {"start": START_SECONDS[plan.spec.cluster.engine] + weights / LOAD_BYTES_PER_SECOND}
    if work.covariance.shards:
        found["covariance"] = phase([work.covariance], EFFICIENCY["covariance"])
    for name, rounds in work.scored.items():
        found[name] = phase(rounds, EFFICIENCY["scoring"])
        if name in work.generated:
            found[name] += phase(work.generated[name], EFFICIENCY["generation"])
    if work.general:
        found["general"] = phase(work.general, EFFICIENCY["general"])
    if work.memory:
        found["memory"] = phase(work.memory, EFFICIENCY["covariance"])
    if plan.spec.method.is_memory:
        found["memory"] += crossing
        return {name: found[name] for name in _ORDER if name in found}
    if work.gradients:
        found["training"] = phase(work.gradients, EFFICIENCY["gradients"]) + crossing
        return {name: found[name] for name in _ORDER if name in found}
    if work.attribution:
        found["attribution"] = phase(work.attribution, EFFICIENCY["attribution"])
        found["insertion"] = crossing
        return {name: found[name] for name in _ORDER if name in found}
    found["values"] = phase(work.values, EFFICIENCY["values"])
    found["insertion"] = phase(work.keys, EFFICIENCY["keys"]) + merge + apply + crossing
    return {name: found[name] for name in _ORDER if name in found}


_ORDER = (
    "start",
    "covariance",
    "baseline",
    "memory",
    "values",
    "attribution",
    "insertion",
    "training",
    "evaluation",
    "general",
)
_FLOAT, _DOUBLE = 4, 8
_VALUE_ROW_BYTES, _METRICS_ROW_BYTES = 60, 150
# Of Parquet, compressed. Measured with CounterFact: 38 and 92 bytes a row, 28 and 32 an edit.
_METRICS_STORED_BYTES, _EDIT_STORED_BYTES = 60, 32
# Neurons that stand out in some prompt of a fact: 69 with the facts of the embedded model, whose
# rows took 11 bytes each.
_CANDIDATES, _CANDIDATE_BYTES, _CANDIDATE_STORED_BYTES = 70, 60, 11


def _moved(plan: Plan, model: ModelOutline, covariance_shards: int) -> Transfer:
    d, keys, updates = model.hidden_size, 0, 0
    sizes = [model.key_size(layer) for layer in plan.layers]
    for shards in plan.rounds.shards:
        edits = sum(len(shard.items) for shard in shards)
        for f in sizes:
            groups = groups_of(shards, f)
            as_keys = edits * (f + d) * _FLOAT
            as_sums = len(groups) * (f + d) * f * _DOUBLE
            # What an edit still lacks goes out with the question, D numbers.
            keys += edits * d * _FLOAT + (as_sums if len(groups) < len(shards) else as_keys)
            updates += update_bytes(edits, f, d)
    return Transfer(
        values=plan.num_requests * len(plan.stages) * (d * _FLOAT + _VALUE_ROW_BYTES),
        keys=keys,
        updates=updates,
        metrics=_num_scored(plan) * _METRICS_ROW_BYTES,
        covariance=covariance_shards * sum(f * f for f in sizes) * _DOUBLE,
    )


def _moved_in_training(
    plan: Plan, model: ModelOutline, edits: Sequence[EditPrompts], steps: int
) -> Transfer:
    """Of a gradient method: `keys` are factors, `updates` what every step changes, dense."""
    method, d = build_gradient_method(plan.spec.method), model.hidden_size
    tokens = [
        sum(len(edit.target) + (stem - 1 if method.tokens == "all" else 0) for stem in edit.stems)
        for edit in edits
    ]
    rows = plan.num_requests * method.epochs * sum(tokens) / len(tokens)
    sizes = [model.key_size(layer) for layer in plan.layers]
    return Transfer(
        values=0,
        keys=int(rows * sum(f + d for f in sizes) * _FLOAT),
        updates=sum(f * d for f in sizes) * _FLOAT * steps,
        metrics=_num_scored(plan) * _METRICS_ROW_BYTES,
        covariance=0,
    )


def _moved_in_locating(plan: Plan, model: ModelOutline) -> Transfer:
    """Of a method that looks for neurons: `values` are the rows of attributions."""
    facts = plan.num_requests
    return Transfer(
        values=facts * _CANDIDATES * _CANDIDATE_BYTES,
        keys=0,
        updates=_neuron_bytes(plan, model),
        metrics=_num_scored(plan) * _METRICS_ROW_BYTES,
        covariance=0,
    )


def _moved_adapters(plan: Plan, model: ModelOutline, edits: Sequence[EditPrompts]) -> Transfer:
    """Of a method that makes adapters: `keys` are its remembered queries, there and back."""
    queries = build_adapter_method(plan.spec.method).num_queries * model.hidden_size * _FLOAT
    return Transfer(
        values=0,
        keys=2 * queries,
        updates=2 * _patch_bytes(plan, model, edits),
        metrics=_num_scored(plan) * _METRICS_ROW_BYTES,
        covariance=0,
    )


def _moved_memories(plan: Plan, model: ModelOutline, edits: Sequence[EditPrompts]) -> Transfer:
    """Of a method with a memory: `values` are its rows, `updates` what makes them known."""
    size = _memory_bytes(plan, model, edits)
    return Transfer(
        values=size,
        keys=0,
        updates=size,
        metrics=_num_scored(plan) * _METRICS_ROW_BYTES,
        covariance=0,
    )


def _memory_bytes(plan: Plan, model: ModelOutline, edits: Sequence[EditPrompts]) -> int:
    """Of all edits of a job."""
    beside = EditMemorySize.of(plan.spec.method.serac, model, edits)
    return plan.num_requests * beside.edit_bytes


def _neuron_bytes(plan: Plan, model: ModelOutline) -> int:
    """Bytes of updates: two factors, a column and a row a neuron, as if all facts were alike."""
    entries = max(model.key_size(layer) for layer in plan.layers) + model.hidden_size
    return plan.num_requests * plan.spec.method.kn.most_neurons * entries * _FLOAT


def _patch_bytes(plan: Plan, model: ModelOutline, edits: Sequence[EditPrompts]) -> int:
    """Of all patches of a job: key, value and query, and a bias."""
    most = plan.spec.method.t_patcher.max_patches
    patches = sum(min(len(edit.target), most) for edit in edits) / len(edits)
    return int(plan.num_requests * patches * (3 * model.hidden_size + 1) * _FLOAT)


def _stored(plan: Plan, model: ModelOutline, edits: Sequence[EditPrompts]) -> dict[str, int]:
    """Bytes of a run's parts; `edits`, `values`, `metrics`, `update` and a study's `keys`."""
    d = model.hidden_size
    sizes = [model.key_size(layer) for layer in plan.layers]
    rounds = [sum(len(shard.items) for shard in shards) for shards in plan.rounds.shards]
    found = {
        "edits": len(plan.rows) * _EDIT_STORED_BYTES,
        "metrics": _num_scored(plan) * _METRICS_STORED_BYTES,
    }
    if plan.spec.method.is_locating:
        attributions = plan.num_requests * _CANDIDATES * _CANDIDATE_STORED_BYTES
        return {**found, "attributions": attributions, "update": _neuron_bytes(plan, model)}
    if plan.spec.method.is_piecewise:
        size = _patch_bytes(plan, model, edits)
        return {**found, "update": size, "piece": size}
    if plan.spec.method.is_memory:
        size = _memory_bytes(plan, model, edits)
        return {**found, "memory": size, "update": size}
    if plan.spec.method.name == "calinet":
        matrices = 3 if plan.spec.method.calinet.gated else 2
        slots = plan.spec.method.calinet.slots * len(rounds) * len(sizes)
        return {**found, "update": slots * matrices * d * _FLOAT}
    if not plan.spec.method.is_closed_form:
        return {**found, "update": len(rounds) * sum(f * d * _FLOAT for f in sizes)}
    found["values"] = plan.num_requests * len(plan.stages) * d * _FLOAT
    found["update"] = sum(update_bytes(edits, f, d) for edits in rounds for f in sizes)
    if plan.spec.rounds is not None:
        found["keys"] = sum(edits * (f + d) * _FLOAT for edits in rounds for f in sizes)
    return found


def _num_scored(plan: Plan) -> int:
    """Rows of metrics/, of all evaluated rounds and the baseline."""
    rounds = list(plan.rounds.evaluated)
    if plan.spec.evaluation.baseline:
        rounds.insert(0, BASELINE_ROUND)
    return sum(len(plan.rounds.probes(round)) for round in rounds)
