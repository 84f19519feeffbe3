"""SERAC as whole jobs: trained, a batch, rounds, interrupted, exported."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import (
    apply_updates,
    export_model,
    load_serac,
    run_batch_edit,
    run_sequential,
    run_survey,
    unedit,
)
from pipeline.cli import main
from pipeline.cluster.learning import run_training
from pipeline.cluster.plan import make_plan
from pipeline.errors import InputError
from pipeline.evaluation.survey import SHARES
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.planning.efficiency import CALL_SECONDS, EFFICIENCY
from pipeline.planning.estimate import make_estimate
from pipeline.planning.flops import ModelSize
from pipeline.planning.outline import outline
from pipeline.report.page import write_report
from pipeline.results import Run, read
from pipeline.results.planned import Estimate
from pipeline.results.updates import read_update
from pipeline.spec import JobSpec, ModelSpec
from tests.tiny_jobs import TinyJobs, digests, records, statuses

SERAC = (
    "method.name=serac",
    "method.layers=null",
    "method.contexts=null",
    "method.serac.embedding_size=8",
)
TRAIN = (
    "train={steps: 3, batch_size: 4, accumulate: 2, learning_rate: 0.01, checkpoint_every: 2,"
    " validate_every: 2, validation: 0.2}",
)
ROUNDS = "rounds={size: 5, evaluate: [current]}"
SINGLE = "rounds={size: 1, rollback: true, evaluate_every: 1, evaluate: [current]}"
KEEP = "output.on_divergence=keep"  # the editor is hardly trained


@cache
def _editor(tiny: TinyJobs) -> Path:
    path = tiny.root / "serac"
    run_training(tiny.spec(path, *SERAC, *TRAIN, requests=records(40)))
    return path / "editor"


def serac_spec(tiny: TinyJobs, output: Path, *changes: str, **choices: Any) -> JobSpec:
    """A job with an editor that is trained once, and hardly."""
    editor = f"method.serac.editor={_editor(tiny)}"
    return tiny.spec(output, *SERAC, editor, KEEP, *changes, **choices)


def _bits(run: Run) -> dict[str, Any]:
    return {**digests(run), "memory": run.memory().to_pylist()}


def by_case(run: Run) -> Any:
    return run.memory().sort_by("case_id")


def test_training_is_gone_on_with_to_the_same_bits(tiny: TinyJobs, tmp_path: Path) -> None:
    whole = load_file(_editor(tiny) / "editor.safetensors")
    assert {name.split(".")[0] for name in whole} == {"classifier", "counterfactual"}
    spec = tiny.spec(tmp_path / "run", *SERAC, *TRAIN, requests=records(40))
    shutil.copytree(_editor(tiny).parent, tmp_path / "run")
    # As if the driver had been killed after its first checkpoint.
    shutil.rmtree(tmp_path / "run" / "editor")
    lines = (tmp_path / "run" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "manifest.jsonl").write_text("".join(lines[:2]))
    run_training(spec)
    again = load_file(tmp_path / "run" / "editor" / "editor.safetensors")
    measured = [row["edits"] for row in read(tmp_path / "run").training().to_pylist()]
    assert set(measured) == {8}
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_batch_is_remembered_and_the_weights_stay(tiny: TinyJobs, tmp_path: Path) -> None:
    result = run_batch_edit(serac_spec(tiny, tmp_path / "run"))
    run = read(result.path)
    assert statuses(run) == {"applied": 12}
    memory = by_case(run)
    wanted = [record["requested_rewrite"] for record in records(12)]
    assert memory["case_id"].to_pylist() == sorted(str(i) for i in range(12))
    wanted = [wanted[int(case_id)] for case_id in memory["case_id"].to_pylist()]
    assert memory["prompt"].to_pylist() == [
        one["prompt"].replace("{}", one["subject"]) for one in wanted
    ]
    assert memory["target"].to_pylist() == [one["target_new"]["str"] for one in wanted]
    (update,) = run.updates()
    adapter = read_update(update)[1]
    expected = torch.tensor(run.memory()["embedding"].to_pylist())
    assert torch.equal(adapter.parts["embeddings"], expected)
    write_report([result.path])
    # What no edit holds has the unedited model's scores, to the bit.
    rows = run.metrics().sort_by([("case_id", "ascending"), ("probe_index", "ascending")])
    rounds = [
        [row for row in rows.to_pylist() if row["round"] == round and row["probe"] == probe]
        for round in (-1, 0)
        for probe in ("rewrite", "neighborhood")
    ]
    same = [
        [one["nll_new"] == other["nll_new"] for one, other in zip(before, after, strict=True)]
        for before, after in ((rounds[0], rounds[2]), (rounds[1], rounds[3]))
    ]
    assert not any(same[0])
    assert all(same[1]) or any(same[1])


def test_rounds_add_up_to_the_batch_and_can_be_gone_on_with(tiny: TinyJobs, tmp_path: Path) -> None:
    study = read(run_sequential(serac_spec(tiny, tmp_path / "study", ROUNDS)).path)
    assert statuses(study) == {"applied": 12}
    whole = _bits(study)
    batch = read(run_batch_edit(serac_spec(tiny, tmp_path / "batch")).path)
    texts = ["case_id", "prompt", "target"]
    assert by_case(study).select(texts).equals(by_case(batch).select(texts))
    both = [torch.tensor(by_case(run)["embedding"].to_pylist()) for run in (study, batch)]
    torch.testing.assert_close(*both)
    # Killed in the second round, before its change was written.
    lines = (study.path / "manifest.jsonl").read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if "memory/round-00001" in line)
    (study.path / "manifest.jsonl").write_text("".join(lines[: place + 1]))
    assert _bits(read(run_sequential(serac_spec(tiny, study.path, ROUNDS)).path)) == whole


def _rows_of(run: Run, case_id: str) -> list[dict[str, Any]]:
    order = [("probe", "ascending"), ("probe_index", "ascending")]
    rows = run.metrics().sort_by(order).drop_columns(["round", "edit_round"]).to_pylist()
    return [row for row in rows if row["case_id"] == case_id]


def test_a_single_edit_is_alone_in_the_memory(tiny: TinyJobs, tmp_path: Path) -> None:
    plain, five = (KEEP, "evaluation.baseline=false"), records(5)
    spec = serac_spec(tiny, tmp_path / "study", SINGLE, *plain, requests=five)
    study = read(run_sequential(spec).path)
    round_of = {row["case_id"]: row["round"] for row in study.edits().to_pylist()}
    assert statuses(study) == {"applied": 5}
    for number in (0, 3):
        one = serac_spec(tiny, tmp_path / str(number), *plain, requests=[five[number]])
        alone = read(run_batch_edit(one).path)
        found = _rows_of(study, str(number))
        assert found and found == _rows_of(alone, str(number))
        export_model(study.path, tmp_path / f"out-{number}", round=round_of[str(number)])
        held = load_serac(tmp_path / f"out-{number}").router.memory
        assert [entry.key for entry in held] == [str(number)]
    # All five together answer some probe otherwise: the edits were not there at the same time.
    batch = read(run_batch_edit(serac_spec(tiny, tmp_path / "batch", *plain, requests=five)).path)
    both = [[_rows_of(run, str(i)) for i in range(5)] for run in (study, batch)]
    assert both[0] != both[1]
    whole = _bits(study)
    # Killed in the third round, when it had been remembered.
    lines = (study.path / "manifest.jsonl").read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if "memory/round-00002" in line)
    (study.path / "manifest.jsonl").write_text("".join(lines[: place + 1]))
    assert _bits(read(run_sequential(spec).path)) == whole


def test_a_single_edit_that_cannot_be_remembered_fails_alone(
    tiny: TinyJobs, tmp_path: Path
) -> None:
    broken = f"model.path={tiny.broken_model()}"
    run_training(tiny.spec(tmp_path / "train", *SERAC, *TRAIN, broken, requests=records(40)))
    editor = f"method.serac.editor={tmp_path / 'train' / 'editor'}"
    asked = records(3)
    asked[1]["requested_rewrite"]["subject"] = "Жук"
    changes = (*SERAC, editor, broken, KEEP, SINGLE, "evaluation.baseline=false")
    run = read(run_sequential(tiny.spec(tmp_path / "run", *changes, requests=asked)).path)
    edits = {row["case_id"]: row for row in run.edits().to_pylist()}
    assert {case: row["status"] for case, row in edits.items()} == {
        "0": "applied", "1": "failed", "2": "applied",
    }  # fmt: skip
    assert "its embedding is not finite" in edits["1"]["reason"]
    assert sorted(run.memory()["case_id"].to_pylist()) == ["0", "2"]


def test_a_survey_has_all_its_cells(tiny: TinyJobs, tmp_path: Path) -> None:
    editors = f"survey.editors=[{{name: serac, serac: {{editor: {_editor(tiny)}}}}}]"
    sizes = ("survey.single.facts=2", "survey.batch.sizes=[4]")
    sizes += ("survey.sequence={sizes: [2, 4], rounds_of: 2}",)
    spec = tiny.spec(tmp_path / "survey", *SERAC[1:3], editors, *sizes, requests=records(9))
    result = run_survey(spec)
    rows = result.table.to_pylist()
    assert {row["status"] for row in rows} == {"done"} and not result.failed
    found = {(row["setting"], row["edits"], row["measure"]): row["value"] for row in rows}
    cells = [("single", 2), ("batch", 4), ("sequence", 4)]
    assert [cell[:2] for cell in found if cell[2] == "memory"] == cells
    assert all(0 < found[*cell, "seconds"] <= found[*cell, "wall_seconds"] for cell in cells)
    # The memory knows no order: after its last round a sequence is the batch.
    for measure in SHARES:
        assert found["sequence", 4, measure] == found["batch", 4, measure]
    assert run_survey(spec).table.equals(result.table)


def test_it_is_planned_by_the_calls_of_its_models(tiny: TinyJobs, tmp_path: Path) -> None:
    def found(*changes: str, count: int = 12) -> Estimate:
        spec = serac_spec(tiny, tmp_path / "run", *changes, requests=records(count))
        return make_estimate(make_plan(spec), rate=1e5, workers=(1, 2))

    twelve, six = found(), found(count=6)
    assert set(twelve.seconds[1]) == {"start", "baseline", "memory", "evaluation"}
    # A memory has its classifier's pass over every edit, in one call.
    model = outline(ModelSpec(path=str(tiny.model()), dtype="float32"), device=torch.device("cpu"))
    tokenizer = load_tokenizer(ModelSpec(path=str(tiny.model())))
    tokens = [
        len(tokenizer(text)["input_ids"])
        for record in records(12)
        for one in (record["requested_rewrite"],)
        for text in (f"{one['prompt'].replace('{}', one['subject'])} {one['target_new']['str']}",)
    ]
    flops = 2 * sum(ModelSize.of(model).blocks[:2]) * sum(tokens)
    expected = flops / (1e5 * EFFICIENCY["covariance"]) + CALL_SECONDS["in_process"]
    assert twelve.seconds[1]["memory"] == pytest.approx(expected, rel=0.01)
    # The unedited model is asked without a memory, the edited one with it.
    assert twelve.seconds[1]["evaluation"] > 1.5 * twelve.seconds[1]["baseline"]
    assert twelve.stored["memory"] == 2 * six.stored["memory"] == twelve.moved.updates
    assert twelve.memory.worker["copies of edited weights"] == 0
    # Rounds that are rolled back are made side by side.
    apart = found(SINGLE)
    assert apart.seconds[2]["memory"] == pytest.approx(apart.seconds[1]["memory"] / 2, rel=0.1)


def test_edits_are_taken_out_of_the_memory_again(
    tiny: TinyJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = serac_spec(tiny, tmp_path / "study", ROUNDS, "rounds.evaluate_every=1")
    study = read(run_sequential(spec).path)
    gone = ["3", "8"]
    with pytest.raises(SystemExit) as ended:
        named = [part for case_id in gone for part in ("--case-id", case_id)]
        main(["unedit", str(study.path), *named, "--output", str(tmp_path / "out")])
    assert ended.value.code in (None, 0) and "other edits" in capsys.readouterr().out
    kept = [record for record in records(12) if str(record["case_id"]) not in gone]
    never = read(run_batch_edit(serac_spec(tiny, tmp_path / "never", requests=kept)).path)
    expected = {
        (row["case_id"], row["probe"], row["probe_index"]): row["nll_new"]
        for row in never.metrics().to_pylist()
        if row["round"] == 0
    }
    rows = pq.read_table(tmp_path / "out" / "unedit.parquet").to_pylist()
    found = {
        (row["case_id"], row["probe"], row["probe_index"]): row["nll_new_after"]
        for row in rows
        if not row["is_removed"]
    }
    assert found.keys() == expected.keys()
    assert [found[key] for key in expected] == pytest.approx(list(expected.values()), abs=1e-5)
    assert {row["case_id"] for row in rows if row["is_removed"]} == set(gone)
    summary = json.loads((tmp_path / "out" / "unedit.json").read_text())
    assert (summary["edits_left"], summary["layers"], summary["rounds_solved_again"]) == (
        10,
        {},
        [],
    )
    held = load_serac(tmp_path / "out" / "model").router.memory
    assert {entry.key for entry in held} == {str(record["case_id"]) for record in kept}
    with pytest.raises(InputError, match="holds no such edits: '99'"):
        unedit(study.path, ["99"], tmp_path / "other")


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_ray_gives_the_bits_of_one_process(tiny: TinyJobs, tmp_path: Path, local_ray: None) -> None:
    alone = read(run_batch_edit(serac_spec(tiny, tmp_path / "alone")).path)
    spec = serac_spec(tiny, tmp_path / "ray", "cluster.engine=ray", "cluster.workers=2")
    assert _bits(read(run_batch_edit(spec).path)) == _bits(alone)


def test_an_export_answers_as_the_run_was_scored(tiny: TinyJobs, tmp_path: Path) -> None:
    spec = serac_spec(
        tiny, tmp_path / "run", "evaluation.generate=true", "evaluation.generate_tokens=4"
    )
    run = read(run_batch_edit(spec).path)
    export_model(run.path, tmp_path / "out")
    served = load_serac(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = [
        row for row in run.metrics().to_pylist() if row["round"] == 0 and row["probe"] == "rewrite"
    ]
    for row in rows[:4]:
        given = served.tokenizer(row["prompt"], return_tensors="pt")
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        ids = served.generate(given["input_ids"], given["attention_mask"], **options)
        new = ids[0, given["input_ids"].shape[1] :]
        assert served.tokenizer.decode(new, skip_special_tokens=True) == row["generated"]
    far = served.tokenizer("Because it is old", return_tensors="pt")
    served.router.memory.remove([str(i) for i in range(12)])
    with torch.no_grad():
        assert torch.equal(served(**far).logits, base(**far).logits)
    with pytest.raises(InputError, match="load_serac"):
        apply_updates(load_model(spec.model, torch.device("cpu")), run.path)


def test_wrong_settings_are_refused(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is for \[0\], not \[0, 1\]; leave them out"):
        run_batch_edit(serac_spec(tiny, tmp_path / "a", "method.layers=[0, 1]"))
    with pytest.raises(InputError, match="serac edits no layer; leave them out"):
        run_training(tiny.spec(tmp_path / "a", *SERAC, *TRAIN, "method.layers=[0, 1]"))
    with pytest.raises(InputError, match="wrappers: serac changes no weight"):
        run_batch_edit(serac_spec(tiny, tmp_path / "b", "method.wrappers=[rect]"))
    with pytest.raises(InputError, match="it is 8 in the editor"):
        run_batch_edit(serac_spec(tiny, tmp_path / "c", "method.serac.embedding_size=9"))
    with pytest.raises(InputError, match="9 are to be copied, and the model has 4"):
        run_training(tiny.spec(tmp_path / "d", *SERAC, *TRAIN, "method.serac.classifier_blocks=9"))
    assert not list(tmp_path.iterdir())
