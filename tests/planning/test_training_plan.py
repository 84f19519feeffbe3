"""The estimate of a training: what is counted against what is computed, and what is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import load_spec, run_training
from pipeline.cli import main
from pipeline.cluster.examples import Examples
from pipeline.cluster.learning import training_spec
from pipeline.cluster.plan import Plan, make_plan
from pipeline.cluster.reducer import Reducer
from pipeline.cluster.worker import EditWorker
from pipeline.methods.edit_examples import EditExample
from pipeline.methods.trainable import Shapes
from pipeline.models.loading import load_tokenizer
from pipeline.planning.estimate import make_estimate
from pipeline.planning.outline import outline
from pipeline.planning.training_flops import COUNTS, Cost, StepWork
from pipeline.prompts import encode_targets
from pipeline.report.page import write_report
from pipeline.requests import EditRequest
from pipeline.results import read
from pipeline.results.planned import Estimate, read_estimate
from pipeline.spec import parse_spec
from tests import encoder_decoders
from tests.oracles.flops import CountedProducts
from tests.tiny_jobs import TinyJobs, changed, records

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


def _settings(tiny: TinyJobs, output: Path, name: str, *changes: str, **choices: Any) -> Any:
    own = (f"method.name={name}", "method.contexts=null", *METHODS[name], "train.steps=6")
    return changed(tiny.settings(output, requests=records(30), **choices), *own, *changes)


def _plan(tiny: TinyJobs, output: Path, name: str, *changes: str, **choices: Any) -> Plan:
    settings = _settings(tiny, output, name, *changes, **choices)
    return make_plan(training_spec(parse_spec(settings, "the test")))


def _targets(plan: Plan, requests: list[EditRequest]) -> list[tuple[int, ...]]:
    texts = [request.target_new for request in requests]
    return encode_targets(load_tokenizer(plan.spec.model), texts)


def _pieces(plan: Plan) -> list[tuple[Any, ...]]:
    """A step whose examples are all the same one, so that nothing is padded."""
    examples = Examples(plan)
    (request, *_) = examples.learnt
    asked = request.paraphrase_prompts[0]
    alike = [EditExample(request, asked, (asked, "London"))] * examples.of_step

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
    # A learner is made by its first call, which is another's.
    worker.contribute(pieces[0], 0, reducer.begin_step(learns), learns=learns, version=0)
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


@pytest.mark.parametrize("name", METHODS)
def test_a_planned_training_holds_the_bytes_that_were_estimated(
    tiny: TinyJobs, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings(tiny, tmp_path / "run", name, "train.validate_every=2", "train.steps=2")
    settings["train"]["validation"] = 0.5
    if name == "malmen":
        settings["train"]["batch_size"] = 12
    path = tiny.spec_file(tmp_path / "spec.yaml", settings)
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), "--gflops", "1", "--worker-memory", "2", "--save"])
    out = " ".join(capsys.readouterr().out.split())
    assert ended.value.code in (None, 0)
    assert "30 read" in out and "15 to train on, 15 to measure on" in out
    assert f"training: {name}" in out and "2 steps at most" in out and "1 measurements" in out
    assert "a step gives workers" in out and "steps an edit" not in out
    found = read_estimate(tmp_path / "run")
    assert found is not None and set(found.seconds[1]) == {"start", "training"}

    run = read(run_training(load_spec(path)).path)
    (checkpoint,) = run.files("checkpoint")
    editor = run.path / "editor" / "editor.safetensors"
    headers = 40_000  # names and shapes of tensors
    assert 0 <= editor.stat().st_size - found.stored["editor"] < headers
    assert 0 <= checkpoint.stat().st_size - found.stored["checkpoint"] < headers
    page = write_report([run.path]).read_text()
    assert "Plan and reality" in page and "checkpoint in the run directory" in page


def test_what_the_estimate_of_a_training_follows(tiny: TinyJobs, tmp_path: Path) -> None:
    def found(*changes: str, **given: Any) -> Estimate:
        plan = _plan(tiny, tmp_path, "mend", "train.validation=0", *changes)
        return make_estimate(plan, **{"rate": 1e6, "workers": (1, 2), **given})

    once, often = found(), found("train.steps=60")
    assert often.seconds[1]["training"] == pytest.approx(10 * once.seconds[1]["training"], rel=0.02)
    # One piece of 8 edits: a second worker has nothing to do, but the bytes cross.
    assert once.seconds[2]["training"] >= once.seconds[1]["training"]
    wide = found("train.accumulate=16")
    assert wide.seconds[1]["training"] == pytest.approx(4 * once.seconds[1]["training"], rel=0.1)
    assert wide.seconds[2]["training"] == pytest.approx(wide.seconds[1]["training"] / 2, rel=0.1)
    assert once.training is not None and wide.training is not None
    assert wide.training.step_out == once.training.step_out
    assert wide.training.step_back == 2 * once.training.step_back
    assert once.moved.parameters == 6 * once.training.step_out
    assert once.moved.gradients == 6 * once.training.step_back == 6 * 4 * once.training.parameters
    assert once.training.held == once.training.measurements == 0
    measured = found("train.validation=0.2", "train.validate_every=2")
    assert measured.training is not None and measured.training.measurements == 3
    assert measured.seconds[1]["training"] > once.seconds[1]["training"]
    # Without a measurement there is no best editor to keep.
    best = measured.stored["checkpoint"] - once.stored["checkpoint"]
    assert best == once.stored["editor"]


def test_what_malmen_moves(tiny: TinyJobs, tmp_path: Path) -> None:
    plan = _plan(tiny, tmp_path, "malmen")
    found = make_estimate(plan, rate=1e6, workers=(1,)).training
    assert found is not None
    model = outline(plan.spec.model, device=CPU)
    d, f = model.hidden_size, model.key_size(1)
    examples = Examples(plan)
    targets = [
        sum(len(ids) for ids in _targets(plan, [example.edit for example in shard.items]))
        for number in range(6)
        for shard in examples.step(number)
    ]
    # Updates out; factors of all target tokens and the gradients of two pieces back.
    assert found.step_out == 2 * d * f * 4
    mean = sum(targets) / 6
    assert found.step_back == pytest.approx(mean * 2 * (d + f) * 4 + 2 * 2 * d * f * 8, abs=1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (("method.name=memit",), "memit has no editor to train"),
        (("rounds={size: 2}",), "rounds: a training has none"),
        (("survey={editors: [{}]}",), "survey: a training has none"),
        (("train.batch_size=40", "train.accumulate=1"), "train.batch_size: 40 edits"),
    ],
)
def test_trainings_that_cannot_be_planned_say_why(
    tiny: TinyJobs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: tuple[str, ...],
    reason: str,
) -> None:
    path = tiny.spec_file(tmp_path / "spec.yaml", _settings(tiny, tmp_path / "run", "mend"))
    sets = [part for change in changes for part in ("--set", change)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), "--gflops", "1", *sets])
    assert ended.value.code == 2 and reason in " ".join(capsys.readouterr().err.split())


def test_options_that_do_not_fit_a_training_are_refused(
    tiny: TinyJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny.spec_file(tmp_path / "spec.yaml", _settings(tiny, tmp_path / "run", "mend"))
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), "--gflops", "1", "--steps", "5"])
    assert ended.value.code == 2 and "--set train.steps=N" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), "--gflops", "1", "--worker-memory", "0.477"])
    assert ended.value.code == 1 and "lower train.batch_size" in capsys.readouterr().err
