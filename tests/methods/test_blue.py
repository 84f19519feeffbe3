"""BLUE: two layers, each with values of its own, searched on what the layer before has left."""

import copy
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config

from pipeline.cluster.sharing import values_key
from pipeline.editing.covariance import gram_sums
from pipeline.editing.keys import KeyWave
from pipeline.editing.update import EditedWeights
from pipeline.errors import InputError
from pipeline.methods import ClosedForm, build_closed_form, resolve_settings
from pipeline.results import RunStore
from pipeline.results.keys import read_keys
from pipeline.spec import MethodSpec, ValueSpec, parse_spec
from tests.cases import (
    ALL_FAMILIES,
    CONTEXTS,
    SETTINGS,
    THREE,
    Case,
    case,
    fresh,
    relative_error,
    token_rows,
)
from tests.methods.plain import Plain, memit, stored_updates
from tests.oracles.memit import (
    Edit,
    _edit_weight,
    block_output,
    compute_value,
    update_weights,
)
from tests.oracles.memit import _prompt_row as prompt_row
from tests.tiny_jobs import CONTEXTS as JOB_CONTEXTS
from tests.tiny_jobs import VALUE, TinyJobs, records

EDGES = (0, 2)  # the layer between them stays as it is
WEIGHT = 0.5
QUICK = ("gpt2", "llama")
TWO = THREE[:2]
QUIET = ("evaluation.probes=[]", "evaluation.baseline=false", "method.max_drift=1000")
BLUE = ("method.layers=[0, 1, 2]", "method.wrappers=[blue]")
FIVE = records(5)


@cache
def _covariances(family: str) -> dict[int, Tensor]:
    return gram_sums(case(family).editable, EDGES, token_rows(), 200).covariances()


def _plainly(tiny: Case, edits: list[Edit]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Values and update of each layer: an edit of one layer, then one of the next on its model."""
    names = {module: name for name, module in tiny.model.named_modules()}
    edited = copy.deepcopy(tiny.model)
    blocks, downs = (
        [edited.get_submodule(names[module]) for module in modules]
        for modules in (tiny.blocks, tiny.down_projections)
    )
    parts = edited, tiny.tokenizer, blocks
    for layer in EDGES:
        values = [compute_value(*parts, layer, edit, CONTEXTS, **SETTINGS)[0] for edit in edits]
        given = downs, [layer], edits, CONTEXTS, _covariances(tiny.family), WEIGHT, values
        update = update_weights(*parts, *given)[layer]
        _edit_weight(downs[layer], update)
        yield values, update


def _method(**settings: object) -> ClosedForm:
    given = {"layers": EDGES, "covariance_weight": WEIGHT, "wrappers": ("blue",), **settings}
    return build_closed_form(MethodSpec.model_validate({**given, "value": ValueSpec(**SETTINGS)}))


@pytest.mark.parametrize(
    "family",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in ALL_FAMILIES
    ],
)
def test_it_is_two_edits_of_one_layer_each(family: str) -> None:
    """Updates are stored in float32, which leaves about seven digits of a float64 model's."""
    tiny, method = fresh(family), _method()
    weights, prompts = EditedWeights(tiny.editable, EDGES), tiny.prompts(TWO)
    tolerance = 1e-4 if family in ("gemma2", "gptj") else 1e-5
    before = [tiny.editable.oriented_weight(layer).clone() for layer in range(3)]
    for stage, (values, expected) in enumerate(_plainly(case(family), TWO)):
        (layer,) = method.stages[stage]
        found = method.find_values(tiny.editable, prompts, 2, stage=stage)
        for ours, value in zip(found, values, strict=True):
            assert relative_error(ours.z, value) < tolerance
        wave = KeyWave(tiny.editable, prompts, layer, max_tokens=40)
        equations = method.equations(method.penalty(_covariances(family)[layer]), len(TWO))
        equations.add(*method.keys_and_residuals(wave, layer, torch.stack([v.z for v in found])))
        update = equations.solve().matrix()
        assert relative_error(update, expected) < tolerance
        assert expected.norm() > 1e-3 * before[layer].norm()
        weights.apply(layer, update)
    assert torch.equal(tiny.editable.oriented_weight(1), before[1])


def test_a_jobs_values_and_updates_are_those_of_the_plain_loop(tiny: TinyJobs) -> None:
    run = tiny.finished(*QUIET, *BLUE, requests=FIVE)
    assert run.manifest["spec"]["method"]["layers"] == list(EDGES)
    rows, plain = run.values().to_pylist(), Plain(tiny, FIVE, EDGES)
    edits, parts = plain.edits, (plain.model, plain.tokenizer, plain.blocks)
    downs = plain.down_projections
    found, covariances = stored_updates(run), plain.covariances
    assert list(found) == list(EDGES)
    for layer in EDGES:
        of_case = {row["case_id"]: row["z"] for row in rows if row["layer"] == layer}
        values = [torch.tensor(of_case[str(record["case_id"])]) for record in FIVE]
        for edit, value in zip(edits[:2], values, strict=False):
            z, _ = compute_value(*parts, layer, edit, JOB_CONTEXTS, **VALUE)
            assert relative_error(value, z) < 2e-3
        given = downs, [layer], edits, JOB_CONTEXTS, covariances, 0.0, values, memit
        assert relative_error(found[layer], update_weights(*parts, *given)[layer]) < 2e-3
        _edit_weight(downs[layer], found[layer].double())


@pytest.mark.parametrize(
    "changes",
    [
        ["method.name=memit_accumulated", "method.wrappers=[blue, rect]"],
        ["method.name=alphaedit", "method.alphaedit={threshold: 0.05, threshold_is: relative}"],
        pytest.param(["method.name=emmet"], marks=pytest.mark.slow),
        pytest.param(["method.wrappers=[merge, blue]"], marks=pytest.mark.slow),
    ],
    ids=["accumulated and rect", "alphaedit", "emmet", "merge"],
)
def test_every_method_writes_the_whole_of_what_is_missing(
    tiny: TinyJobs, changes: list[str]
) -> None:
    run = tiny.finished(*QUIET, *BLUE, *changes, requests=FIVE)
    values = {(row["layer"], row["case_id"]): row["z"] for row in run.values().to_pylist()}
    assert len(values) == 2 * len(FIVE)
    plain, updates = Plain(tiny, FIVE, EDGES), stored_updates(run)
    edits = dict(zip(plain.case_ids, plain.edits, strict=True))
    for layer, path in RunStore.open(run.path).layers("keys", 0).items():
        stored = read_keys(path)
        assert sorted(stored.case_ids) == sorted(edits)
        for case_id, residual in zip(stored.case_ids, stored.residuals_ND, strict=True):
            edit = edits[case_id]
            row = prompt_row(plain.tokenizer, "{}", edit.prompt, edit.subject)
            hidden = block_output(plain.model, plain.blocks[layer], row)
            z = torch.tensor(values[layer, case_id], dtype=torch.float64)
            assert relative_error(residual, z - hidden) < 1e-3
        assert updates[layer].norm() > 0
        _edit_weight(plain.down_projections[layer], updates[layer].double())


def test_pmet_takes_the_whole_too() -> None:
    tiny, zero = case("gpt2"), torch.zeros(3, 32, dtype=torch.float64)
    method = _method(name="pmet")
    alone = build_closed_form(method.spec.model_copy(update={"layers": (2,), "wrappers": ()}))
    prompts = tiny.prompts(THREE)
    pairs = zip(
        method.find_values(tiny.editable, prompts, 3, stage=1),
        alone.find_values(tiny.editable, prompts, 3),
        strict=True,
    )
    assert all(torch.equal(ours.z, theirs.z) for ours, theirs in pairs)
    for layer in EDGES:
        wave = KeyWave(tiny.editable, prompts, layer, max_tokens=99, written=method.written)
        keys, residuals = method.keys_and_residuals(wave, layer, zero)
        outputs = tiny.editable.down_projection(layer)(wave.read_bare(layer)[0])
        assert keys.shape == (3, 64) and relative_error(residuals, -outputs) < 1e-9


def test_versions_name_the_stage() -> None:
    assert [_method().stage_at(version) for version in range(5)] == [0, 1, 0, 1, 0]
    plain = _method(wrappers=(), layers=(0, 1, 2))
    assert plain.stages == ((0, 1, 2),) and {plain.stage_at(n) for n in range(7)} == {0}


def test_layers_are_the_first_and_the_last(tiny: TinyJobs) -> None:
    xl = GPT2Config(n_layer=48, n_embd=1600, n_head=25)

    def resolved(**method: object) -> MethodSpec:
        return resolve_settings(parse_spec({"method": method}, "test"), xl, "some/model")[0].method

    method = resolved(wrappers=["blue"])
    assert method.layers == (13, 17) and method.stages == ((13,), (17,))
    assert method.covariance_weight == 20000 and resolved().stages == (tuple(range(13, 18)),)
    assert resolved(wrappers=["blue"], layers=[13, 17]) == method
    for settings in ({"layers": [3]}, {"name": "emmet"}):
        with pytest.raises(
            InputError, match=r"method\.wrappers: blue .* give at least two"
        ) as caught:
            resolved(wrappers=["blue"], **settings)
        assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="blue edits two layers, rome one"):
        MethodSpec(name="rome", wrappers=("blue",))
    with pytest.raises(ValueError, match="nas scales values to one anchor"):
        MethodSpec(wrappers=("nas", "blue"))


def test_its_first_search_is_that_of_an_edit_of_that_layer() -> None:
    def key(*wrappers: str, layers: tuple[int, ...]) -> str:
        given = {"layers": layers, "wrappers": wrappers, "contexts": ["{}"], "value": SETTINGS}
        return values_key(parse_spec({"method": {**given, "covariance_weight": 1}}, "test"))

    assert key("blue", layers=(0, 2)) == key("blue", "rect", layers=(0, 3)) == key(layers=(0,))
    assert key("blue", layers=(0, 2)) != key(layers=(0, 2))
