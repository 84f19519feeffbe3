"""PMET: the joint search inside the block, what it leaves to write, and the update."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.editing.keys import KeyWave
from pipeline.editing.values import ValueSettings, find_values
from pipeline.methods import ClosedForm, build_closed_form
from pipeline.spec import MethodSpec, ValueSpec
from tests.cases import (
    ALL_FAMILIES,
    CONTEXTS,
    EDITS,
    SETTINGS,
    THREE,
    Case,
    case,
    fresh,
    relative_error,
)
from tests.methods.plain import Plain, stored_updates
from tests.oracles.memit import Edit, _edit_weight, _prompt_row, compute_key, solve_update
from tests.oracles.pmet import compute_values, module_output
from tests.tiny_jobs import CONTEXTS as JOB_CONTEXTS
from tests.tiny_jobs import COVARIANCE_WEIGHT, LAYERS, VALUE, TinyJobs, records

QUICK = ("gpt2", "gptj", "opt", "gemma2")
INSIDE: dict[str, Any] = SETTINGS | {"inside_block": True}


def _expected(tiny: Case, edits: list[Edit], layer: int = 1, **changes: Any) -> list[Any]:
    parts = tiny.model, tiny.tokenizer, tiny.editable.attention(layer), tiny.down_projections[layer]
    return [compute_values(*parts, edit, CONTEXTS, **SETTINGS | changes) for edit in edits]


@pytest.mark.parametrize(
    "family",
    [
        family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
        for family in ALL_FAMILIES
    ],
)
def test_a_joint_search_is_the_oracles(family: str) -> None:
    tiny = case(family)
    edits = THREE[:2]
    for ours, (z, _, loss, passes) in zip(
        find_values(tiny.editable, tiny.prompts(edits), 1, ValueSettings(**INSIDE), 8),
        _expected(tiny, edits),
        strict=True,
    ):
        assert relative_error(ours.z, z) < tiny.tolerance
        assert ours.loss == pytest.approx(loss, rel=tiny.tolerance)
        assert ours.steps == passes - 1 and ours.delta_norm > 0.01


def test_a_target_that_is_predicted_counts_less() -> None:
    """Some end as soon as the model says it, others go on for the sake of the divergence."""
    tiny = case("llama")
    # The lookup token of the last block says the object itself, so that it is soon predicted.
    edits = [EDITS[3]._replace(target_new=word) for word in ("the", "of")]
    ended = []
    for kl_weight in (0.0, 5.0):
        changes = {"steps": 8, "clamp_norm": 4.0, "weight_decay": 0.001, "stop_loss": 0.0}
        changes["kl_weight"] = kl_weight
        expected = _expected(tiny, edits, 3, **changes)
        found = find_values(
            tiny.editable, tiny.prompts(edits), 3, ValueSettings(**INSIDE | changes), 2
        )
        for ours, (z, _, loss, passes) in zip(found, expected, strict=True):
            assert relative_error(ours.z, z) < 1e-8
            assert ours.loss == pytest.approx(loss, rel=1e-8)
            assert ours.steps == passes - 1
            ended.append(passes)
    assert min(ended) < 8 and len(set(ended)) > 1, ended


def _method(layers: tuple[int, ...], **settings: Any) -> ClosedForm:
    given = {"name": "pmet", "layers": layers, "covariance_weight": 1.0, **settings}
    return build_closed_form(MethodSpec.model_validate({**given, "value": ValueSpec(**SETTINGS)}))


@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt"])
def test_what_is_missing_is_of_the_mlps_output(family: str) -> None:
    tiny, values = case(family), torch.zeros(3, 32, dtype=torch.float64)
    method = _method((0, 1))
    wave = KeyWave(tiny.editable, tiny.prompts(THREE), 1, max_tokens=100, written=method.written)
    for layer, share in ((0, math.sqrt(2)), (1, 1.0)):
        keys, residuals = method.keys_and_residuals(wave, layer, values)
        for i, edit in enumerate(THREE):
            row = _prompt_row(tiny.tokenizer, "{}", edit.prompt, edit.subject)
            output = module_output(tiny.model, tiny.down_projections[1], row)
            assert relative_error(residuals[i], -output / share) < tiny.tolerance
            module = tiny.down_projections[layer]
            key = compute_key(tiny.model, tiny.tokenizer, module, edit, CONTEXTS)
            assert relative_error(keys[i], key) < tiny.tolerance


def test_norm_anchors_scale_what_is_written_itself() -> None:
    tiny = case("llama")
    method = _method((1,), wrappers=["nas"], nas={"anchor_norm": 2.0, "drop_above": 1e6})
    plain = _method((1,)).find_values(tiny.editable, tiny.prompts(THREE), 8)
    for value, before in zip(
        method.find_values(tiny.editable, tiny.prompts(THREE), 8), plain, strict=True
    ):
        assert torch.allclose(value.z, before.z * 2.0 / before.z.norm())


def test_a_jobs_updates_are_the_oracles(tiny: TinyJobs) -> None:
    three = records(3)
    changes = ["method.name=pmet", "evaluation.probes=[]", "evaluation.baseline=false"]
    run = tiny.finished(*changes, "method.max_drift=1000", requests=three)
    plain = Plain(tiny, three)
    last = plain.down_projections[1]
    values = {row["case_id"]: torch.tensor(row["z"]) for row in run.values().to_pylist()}
    rows = [_prompt_row(plain.tokenizer, "{}", e.prompt, e.subject) for e in plain.edits]
    parts = plain.model, plain.tokenizer, plain.blocks[1].attn, last
    z, *_ = compute_values(*parts, plain.edits[0], JOB_CONTEXTS, **VALUE)
    assert relative_error(values[plain.case_ids[0]], z) < 1e-4
    for place, layer in enumerate(LAYERS):
        module = plain.down_projections[layer]
        keys = torch.stack(
            [
                compute_key(plain.model, plain.tokenizer, module, e, JOB_CONTEXTS)
                for e in plain.edits
            ]
        )
        missing: list[Tensor] = [
            values[case_id].double() - module_output(plain.model, last, row)
            for case_id, row in zip(plain.case_ids, rows, strict=True)
        ]
        residuals = torch.stack(missing, dim=1) / math.sqrt(len(LAYERS) - place)
        update = solve_update(keys.T, residuals, plain.covariances[layer], COVARIANCE_WEIGHT)
        assert relative_error(stored_updates(run)[layer], update) < 2e-3
        _edit_weight(module, update)


def test_one_layer_reaches_the_value() -> None:
    """Without a covariance to speak of, the edited MLP puts out the value at the bare prompt."""
    tiny = fresh("gptj")
    prompts = tiny.prompts(THREE, ["{}"])
    method = _method((1,))
    values = torch.stack([v.z for v in method.find_values(tiny.editable, prompts, 8)])
    wave = KeyWave(tiny.editable, prompts, 1, max_tokens=100, written=method.written)
    keys, residuals = method.keys_and_residuals(wave, 1, values)
    update = solve_update(keys.T, residuals.T, torch.eye(64, dtype=torch.float64), 1e-9)
    _edit_weight(tiny.down_projections[1], update)
    for edit, z in zip(THREE, values, strict=True):
        row = _prompt_row(tiny.tokenizer, "{}", edit.prompt, edit.subject)
        output = module_output(tiny.model, tiny.down_projections[1], row)
        assert relative_error(output, z) < 1e-5
