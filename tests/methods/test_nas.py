"""Norm anchors: what values become, and the anchor that a job measures for itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline import run_batch_edit
from pipeline.editing.keys import KeyWave
from pipeline.errors import InputError
from pipeline.methods import build_closed_form, mean_length
from pipeline.results import Run, read
from pipeline.spec import MethodSpec, ValueSpec
from tests.cases import SETTINGS, THREE, case
from tests.methods.plain import Plain
from tests.oracles.memit import _prompt_row, block_output, compute_value, module_input
from tests.tiny_jobs import VALUE, TinyJobs, digests, records

FIVE = records(5)
CHANGES = ("method.wrappers=[nas]", "evaluation.probes=[]")


def test_nas_gives_every_value_the_same_length() -> None:
    tiny = case("llama")
    given = {"layers": (0, 1), "covariance_weight": 1.0, "value": ValueSpec(**SETTINGS)}
    prompts = tiny.prompts(THREE)
    found = build_closed_form(MethodSpec(**given)).find_values(tiny.editable, prompts, 3)
    bare = [replace(prompt, rewrites=prompt.rewrites[:1]) for prompt in prompts]
    keys, hidden = KeyWave(tiny.editable, bare, 1, max_tokens=100).read(1)
    outputs = keys @ tiny.editable.oriented_weight(1).T
    triples = zip(outputs, found, hidden, strict=True)
    lengths = [float((v0 + value.z - h0).norm()) for v0, value, h0 in triples]
    anchor = sorted(lengths)[1]
    # Between the longest and the others: that one is left out.
    drop_above = (max(lengths) + anchor) / (2 * anchor)
    nas = {"anchor_norm": anchor, "drop_above": drop_above}
    method = build_closed_form(MethodSpec(**given, wrappers=("nas",), nas=nas))
    for i, (before, after) in enumerate(
        zip(found, method.find_values(tiny.editable, prompts, 3), strict=True)
    ):
        if lengths[i] == max(lengths):
            assert torch.allclose(after.z, hidden[i]) and after.delta_norm == 0
            continue
        v = outputs[i] + after.z - hidden[i]
        expected = (outputs[i] + before.z - hidden[i]) * anchor / lengths[i]
        assert torch.allclose(v, expected)
        assert after.delta_norm == pytest.approx(float((after.z - hidden[i]).norm()))
        assert (after.loss, after.steps) == (before.loss, before.steps)


def test_the_longest_values_are_left_out_of_the_anchor() -> None:
    assert mean_length([3.0, 1.0, 2.0]) == 2.0
    assert mean_length([1e9, *[1.0] * 19]) == 1.0
    assert mean_length([1e9, 1e9, *[1.0] * 37]) > 1e7


def _anchor(run: Run) -> float:
    anchor: float = run.manifest["spec"]["method"]["nas"]["anchor_norm"]
    return anchor


def _mlp_output(plain: Plain, place: int) -> Tensor:
    edit, module = plain.edits[place], plain.down_projections[1]
    row = _prompt_row(plain.tokenizer, "{}", edit.prompt, edit.subject)
    key = module_input(plain.model, module, row.ids)[row.lookup]
    return plain.weight(1) @ key + module.get_parameter("bias").detach()


def test_a_job_measures_its_anchor_once(tiny: TinyJobs, tmp_path: Path) -> None:
    run = read(run_batch_edit(tiny.spec(tmp_path / "run", *CHANGES, requests=FIVE)).path)
    plain = Plain(tiny, FIVE)
    lengths, hidden = [], []
    for place, edit in enumerate(plain.edits):
        parts = plain.model, plain.tokenizer, plain.blocks, 1
        z, _ = compute_value(*parts, edit, ["{}"], **VALUE)
        row = _prompt_row(plain.tokenizer, "{}", edit.prompt, edit.subject)
        hidden.append(block_output(plain.model, plain.blocks[1], row))
        lengths.append(float((_mlp_output(plain, place) + z - hidden[-1]).norm()))
    assert _anchor(run) == pytest.approx(sum(lengths) / 5, rel=1e-4)
    assert run.manifest["anchor_source"] == "measured"
    values = {row["case_id"]: torch.tensor(row["z"]) for row in run.values().to_pylist()}
    for place, case_id in enumerate(plain.case_ids):
        v = _mlp_output(plain, place) + values[case_id] - hidden[place]
        assert float(v.norm()) == pytest.approx(_anchor(run), rel=1e-4)

    # Cut off after its first part, and gone on with: the same number, whatever a new one would be.
    path, whole = run.path, digests(run)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    lines = (path / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (path / "manifest.jsonl").write_bytes(lines[0])
    run_batch_edit(tiny.spec(path, *CHANGES, requests=FIVE))
    assert digests(read(path)) == whole and _anchor(read(path)) == _anchor(run)
    given = f"method.nas.anchor_norm={_anchor(run)!r}"
    run_batch_edit(tiny.spec(path, *CHANGES, given, requests=FIVE))
    with pytest.raises(InputError, match=r"method\.nas\.anchor_norm was"):
        run_batch_edit(tiny.spec(path, *CHANGES, "method.nas.anchor_norm=5", requests=FIVE))


def test_a_given_anchor_is_taken(tiny: TinyJobs, tmp_path: Path) -> None:
    given = "method.nas.anchor_norm=4"
    spec = tiny.spec(tmp_path / "run", *CHANGES, given, requests=FIVE[:2])
    run = read(run_batch_edit(spec).path)
    assert _anchor(run) == 4.0 and run.manifest["anchor_source"] == "spec"
    assert "anchor" not in run.summary["seconds"]
    with pytest.raises(InputError, match=r"method\.nas\.anchor_norm was 4\.0 and is null"):
        run_batch_edit(tiny.spec(tmp_path / "run", *CHANGES, requests=FIVE[:2]))
