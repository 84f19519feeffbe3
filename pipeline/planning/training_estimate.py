"""How long the training of an editor takes, what it holds and moves: an estimate before it runs."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.cluster.plan import Plan
from pipeline.editing.memory import pass_bytes
from pipeline.methods.hyper_training import BYTES_APART, EDITS_OF_A_PIECE, MAX_TOKENS
from pipeline.methods.serac_training import MAX_TOKENS as SERAC_TOKENS
from pipeline.planning.efficiency import (
    BYTES_PER_SECOND,
    CALL_SECONDS,
    DOUBLE_SHARE,
    EFFICIENCY,
    LOAD_BYTES_PER_SECOND,
    MERGE_THREADS,
    START_SECONDS,
)
from pipeline.planning.memory import BASE_BYTES, REQUEST_BYTES, edited_bytes
from pipeline.planning.outline import ModelOutline
from pipeline.planning.rates import crossing_seconds, makespan
from pipeline.planning.training_flops import Cost, StepWork
from pipeline.planning.training_work import TrainingWork, count_training
from pipeline.results.planned import Memory, PlannedTraining, Transfer

_FLOAT, _DOUBLE = 4, 8
# Of a part of training/: Parquet's own, and a row.
_PART_BYTES, _ROW_BYTES = 3000, 25


def estimate_training(
    plan: Plan,
    model: ModelOutline,
    tokenizer: PreTrainedTokenizerBase,
    rate: float,
    reducer_rate: float | None,
    bytes_per_second: float,
    workers: Sequence[int],
) -> dict[str, Any]:
    """Fields of an `Estimate` of the training of an editor.

    Args: as of `pipeline.planning.estimate.make_estimate`, with a rate and a link's bytes a second.
    """
    work = count_training(plan, model, tokenizer)
    times = _Times(plan, model, work, rate, reducer_rate, bytes_per_second)
    editor = work.count.state_bytes
    rows = work.train.steps + work.measurements
    return {
        "steps": float(work.train.steps),
        "seconds": {count: times.seconds(count) for count in workers},
        "moved": Transfer(parameters=int(work.out), gradients=int(work.back)),
        "stored": {
            "training": work.checkpoints * _PART_BYTES + rows * _ROW_BYTES,
            "checkpoint": work.checkpoint_bytes,
            "editor": editor,
        },
        "memory": _memory(plan, model, work, workers[0]),
        "training": PlannedTraining(
            learnt=work.learnt,
            held=work.held,
            measurements=work.measurements,
            parameters=work.count.parameters,
            step_out=int(work.step.out),
            step_back=int(work.step.back),
        ),
    }


class _Times:
    """Seconds of a training, for any number of workers."""

    def __init__(
        self,
        plan: Plan,
        model: ModelOutline,
        work: TrainingWork,
        rate: float,
        reducer_rate: float | None,
        bytes_per_second: float,
    ) -> None:
        self.plan, self.model, self.work = plan, model, work
        self.rate, self.bytes_per_second = rate, bytes_per_second
        cluster = plan.spec.cluster
        self.a_call = CALL_SECONDS[cluster.engine]
        threads = min(MERGE_THREADS, cluster.reducer_threads) / cluster.cpus_per_worker
        self.reducer = rate * threads if reducer_rate is None else reducer_rate / DOUBLE_SHARE

    def seconds(self, workers: int) -> dict[str, float]:
        """Phase -> seconds."""
        work, train = self.work, self.work.train
        loaded = self.model.num_parameters * self.model.dtype.itemsize
        if self.plan.spec.method.is_memory:
            loaded *= 2  # the reducer begins with copies of the model
        training = train.steps * self._step(work.step, workers)
        training += work.measurements * sum(self._step(m, workers) for m in work.measurement)
        written = work.checkpoints * work.checkpoint_bytes + work.count.state_bytes
        start = START_SECONDS[self.plan.spec.cluster.engine]
        return {
            "start": start + loaded / LOAD_BYTES_PER_SECOND,
            "training": training + written / LOAD_BYTES_PER_SECOND,
        }

    def _step(self, step: StepWork, workers: int) -> float:
        calls = sum(
            makespan([_seconds(cost, self.rate) + self.a_call for cost in pieces], workers)
            for pieces in step.passes
        )
        crossing = crossing_seconds(step.back, step.out, workers, self.bytes_per_second)
        return calls + _seconds(step.reducer, self.reducer) + crossing


def _seconds(cost: Cost, rate: float) -> float:
    passes = cost.passes / EFFICIENCY["gradients"] + cost.network / EFFICIENCY["network"]
    double = cost.double / (DOUBLE_SHARE * EFFICIENCY["merge"])
    return (passes + double) / rate + cost.touched / BYTES_PER_SECOND


def _memory(plan: Plan, model: ModelOutline, work: TrainingWork, workers: int) -> Memory:
    method, count = plan.spec.method, work.count
    weights = model.num_parameters * model.dtype.itemsize
    dense = sum(count.weights.values())
    steps = (work.step, *work.measurement)
    rows = max((step.largest for step in steps), key=lambda rows: rows.tokens)
    most = min(rows.tokens, SERAC_TOKENS if method.is_memory else MAX_TOKENS)
    read = -(-rows.read * most // max(1, rows.tokens))
    gradients = count.parameters * _FLOAT
    worker = {"process": BASE_BYTES, "weights": weights}
    if method.is_memory:
        blocks = len(model.blocks) + method.serac.classifier_blocks
        worker["the editor and its gradients"] = count.state_bytes + gradients
    else:
        blocks = model.num_blocks - plan.layers[0]
        worker["copies of edited weights"] = edited_bytes(model, plan.layers)
        if method.name == "malmen":
            worker["gradients in edited weights"] = 2 * dense * _DOUBLE
        else:
            worker["the editor and its gradients"] = count.state_bytes + 2 * gradients
            assert work.train.batch_size is not None
            batches = max(1, EDITS_OF_A_PIECE // work.train.batch_size)
            apart = dense * min(batches, max(1, BYTES_APART // (dense * _FLOAT)))
            own = model.dtype.itemsize + 2 * _DOUBLE
            worker["weights and gradients of batches"] = apart * own
    worker["activations of a pass"] = pass_bytes(model, most, read, blocks)
    reducer = {
        "process": BASE_BYTES,
        "editor, best one and gradients": 2 * count.state_bytes + 2 * gradients,
        "optimiser": 2 * gradients,
        "what workers returned": int(work.step.back),
    }
    if method.is_memory:
        reducer["weights"] = weights
    driver = {"process": BASE_BYTES, "requests": len(plan.rows) * REQUEST_BYTES}
    return Memory(worker=worker, reducer=reducer, driver=driver)
