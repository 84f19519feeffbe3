"""The estimate of a training: what is counted against what is computed, and what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.cluster.examples import Examples
from pipeline.cluster.learning import training_spec
from pipeline.cluster.plan import Plan, make_plan
from pipeline.cluster.reducer import Reducer
from pipeline.cluster.worker import EditWorker
from pipeline.methods.edit_examples import EditExample
from pipeline.methods.trainable import Shapes
from pipeline.models.loading import load_tokenizer
from pipeline.planning.outline import outline
from pipeline.planning.training_flops import COUNTS, Cost, StepWork
from tests import encoder_decoders
from tests.oracles.flops import CountedProducts
from tests.tiny_jobs import TinyJobs, records

CPU = torch.device("cpu")
METHODS: dict[str, tuple[str, ...]] = {
    "mend": (
        "method.layers=[1, 2]",
        "method.mend.rank=4",
        "train.batch_size=2",
        "train.accumulate=4",
    ),
    "malmen": ("method.layers=[1, 2]", "method.malmen.rank=4", "train.batch_size=20"),
    "ke": (
        "method.layers=[1, 2]",
        "method.ke={condition_size: 8, hidden_size: 8, lstm_size: 4}",
        "train.accumulate=4",
    ),
    "serac": (
        "method.layers=null",
        "method.serac={embedding_size: 8, classifier_blocks: 1, counterfactual_blocks: 2}",
        "train.batch_size=4",
        "train.accumulate=2",
    ),
}


def _plan(tiny: TinyJobs, output: Path, name: str, *changes: str, **choices: Any) -> Plan:
    own = (f"method.name={name}", "method.contexts=null", *METHODS[name])
    spec = tiny.spec(output, *own, "train.steps=6", *changes, requests=records(30), **choices)
    return make_plan(training_spec(spec))


def _pieces(plan: Plan) -> list[tuple[Any, ...]]:
    """A step whose examples are all the same one, so that nothing is padded."""
    examples = Examples(plan)
    (request, *_) = examples.learnt
    asked, left = request.paraphrase_prompts[0], "It is old. The old museum in Rome is"
    alike = [EditExample(request, asked, (left, "London"))] * examples.of_step

    def same(*_: Any, **__: Any) -> list[EditExample]:
        return alike

    examples.trainable.drawn = same  # type: ignore[method-assign]
    return [shard.items for shard in examples.step(0)]


def _computed(plan: Plan, pieces: list[tuple[Any, ...]], *, learns: bool) -> tuple[Any, Any]:
    """Products of all workers and of the reducer in a step."""
    worker, reducer = EditWorker(plan.spec, 1), Reducer(plan.spec.method, 1)
    model = worker.model
    shapes = Shapes(model.hidden_size, {layer: model.key_size(layer) for layer in plan.layers})
    reducer.begin_training(plan.spec, shapes, None)
    of_workers, of_reducer = CountedProducts(), CountedProducts()
    shared = reducer.begin_step(learns)
    passes = Examples(plan).trainable.passes
    for number in range(passes):
        for place, items in enumerate(pieces):
            with of_workers:
                _, part = worker.contribute(items, number, shared, learns=learns, version=0)
            reducer.add(place, part)
        if number < passes - 1:
            with of_reducer:
                shared = reducer.end_pass(number, len(pieces))
    with of_reducer:
        reducer.end_step(len(pieces))
    return of_workers.flops, of_reducer.flops


def _counted(plan: Plan, pieces: list[tuple[Any, ...]], *, learns: bool) -> StepWork:
    model = outline(plan.spec.model, device=CPU)
    count = COUNTS[plan.spec.method.name](
        Examples(plan).trainable, model, load_tokenizer(plan.spec.model), plan.layers
    )
    return count.step(pieces, learns=learns)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(other, marks=pytest.mark.slow) for other in ("llama", "t5"))]
)
def test_products_of_a_step_are_those_that_are_made(
    tiny: TinyJobs, tmp_path: Path, family: str, name: str
) -> None:
    _check_products(tiny, tmp_path, family, name)


@pytest.mark.parametrize("name", ["malmen", "serac"])
def test_so_are_those_of_a_model_with_an_encoder(tiny: TinyJobs, tmp_path: Path, name: str) -> None:
    _check_products(tiny, tmp_path, "t5", name)


def _check_products(tiny: TinyJobs, folder: Path, family: str, name: str) -> None:
    changes: list[str] = []
    if family == "t5":
        encoder_decoders.save("t5", folder / "model")
        changes.append(f"model.path={folder / 'model'}")
        if name != "serac":
            changes.append("method.layers=[0, 1]")  # it has two blocks
    chosen = "gpt2" if changes else family
    plan = _plan(tiny, folder / "run", name, *changes, family=chosen)
    pieces = _pieces(plan)
    for learns in (True, False):
        found = _counted(plan, pieces, learns=learns)
        workers, reducer = _computed(plan, pieces, learns=learns)
        total = sum((cost for costs in found.passes for cost in costs), Cost())
        for cost, made in ((total, workers), (found.reducer, reducer)):
            narrow, wide = cost.passes + cost.network, cost.double
            assert narrow == pytest.approx(made[torch.float32], rel=2e-3)
            assert wide == pytest.approx(made[torch.float64], rel=1e-9)
