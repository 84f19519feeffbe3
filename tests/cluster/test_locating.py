"""Knowledge neurons as whole jobs: the plain procedure, bits, failures, interruptions."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import apply_updates, run_batch_edit, run_sequential
from pipeline.cluster.engine import Call, InProcessEngine
from pipeline.cluster.run import RunResult
from pipeline.errors import InputError, JobFailedError
from pipeline.report.page import write_report
from pipeline.results import Run, read
from pipeline.results.updates import read_update
from pipeline.spec import JobSpec, parse_spec
from pipeline.unediting import unedit
from tests import families
from tests.oracles import knowledge_neurons as oracle
from tests.oracles.memit import rewrite_rows
from tests.tiny_jobs import CONTEXTS, TinyJobs, digests, records

KN = (
    "method.name=kn",
    "method.layers=null",
    "method.kn={steps: 2, shared_by: 1}",
    "output.on_divergence=keep",
)
ROUNDS = ("rounds={size: 5, evaluate: [current]}",)


def _spec(tiny: TinyJobs, output: Path, *changes: str, **choices: Any) -> JobSpec:
    return tiny.spec(output, *KN, *changes, **choices)


def _bits(run: Run) -> dict[str, Any]:
    neurons = run.neurons().to_pylist()
    return {**digests(run), "attributions": run.attributions().to_pylist(), "neurons": neurons}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_batch_job_edits_the_neurons_that_the_plain_procedure_finds(
    tiny: TinyJobs, tmp_path: Path, family: str
) -> None:
    """Llama's output embeddings are not its input's; the former speak for an answer."""
    content = records(6)
    result = run_batch_edit(_spec(tiny, tmp_path / "run", requests=content, family=family))
    assert result.counts["applied"] == 6
    directory = tiny.model(family)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    _, downs = families.modules(model, family)
    is_turned = family == "gpt2"
    weights = [down.get_parameter("weight").detach() for down in downs]
    weights = [weight.T for weight in weights] if is_turned else weights
    embeddings = model.get_output_embeddings().weight.detach()
    assert model.config.tie_word_embeddings == is_turned
    expected = [torch.zeros_like(weight) for weight in weights]
    found: dict[str, list[tuple[int, int]]] = {}
    for record in content:
        fact = record["requested_rewrite"]
        old, new = (
            rewrite_rows(tokenizer, ["{}"], "{}", "x", fact[name]["str"])[0]
            for name in ("target_true", "target_new")
        )
        answers = [row.ids[-row.num_target :] for row in (old, new)]
        prompts = rewrite_rows(tokenizer, CONTEXTS, fact["prompt"], fact["subject"], "x")
        scores = [
            oracle.attribute(model, downs, row.ids[: -row.num_target], answers[0], [0.25, 0.75])
            for row in prompts
        ]
        chosen = oracle.agreed(scores, 0.2, 0.7, 2, 5)
        found[str(record["case_id"])] = chosen
        for block, neuron in chosen:
            value = weights[block].T[[neuron]]
            change = oracle.exchanged(value, embeddings, *answers, (1.0, 8.0))
            expected[block][:, neuron] += change[0]
    run = read(result.path)
    mine: dict[str, list[tuple[int, int]]] = {}
    for row in run.neurons().to_pylist():
        mine.setdefault(row["case_id"], []).append((row["layer"], row["neuron"]))
    assert mine == found
    for path, plain in zip(run.updates(), expected, strict=True):
        update = read_update(path)[1].matrix()
        assert torch.allclose(update.double(), plain, atol=1e-5)
    edited = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in edited.state_dict().items()}
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    applied = apply_updates(edited, result.path)
    both = [families.modules(one, family)[1] for one in (edited, plain)]
    changed: set[tuple[int, int]] = set()
    for block, (new, old) in enumerate(zip(*both, strict=True)):
        differs = new.get_parameter("weight").ne(old.get_parameter("weight"))
        neurons = differs.any(dim=1 if is_turned else 0).nonzero().flatten()
        changed |= {(block, neuron) for neuron in neurons.tolist()}
    assert changed == {pair for pairs in found.values() for pair in pairs}
    applied.revert()
    assert all(torch.equal(weight, before[name]) for name, weight in edited.state_dict().items())


@pytest.mark.parametrize("study", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ray_gives_the_bits_of_one_process(tiny: TinyJobs, tmp_path: Path, study: bool) -> None:
    run, more = (run_sequential, ROUNDS) if study else (run_batch_edit, ())
    here = run(_spec(tiny, tmp_path / "alone", *more))
    cluster = "cluster={engine: ray, workers: 2, shard_size: 3, reducer_threads: 1}"
    there = run(_spec(tiny, tmp_path / "ray", *more, cluster))
    assert _bits(read(here.path)) == _bits(read(there.path))


class Stopped(Exception):
    """Ends a job where a test wants it to."""


def _stopped_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, left = InProcessEngine.submit, [calls]

    def counted(self: InProcessEngine, worker: int, method: str, *a: Any, **k: Any) -> Call:
        left[0] -= method in ("attribute", "change_neurons", "apply")
        if left[0] < 0:
            raise Stopped
        return submit(self, worker, method, *a, **k)

    monkeypatch.setattr(InProcessEngine, "submit", counted)


def test_stopped_anywhere_a_study_ends_with_the_same_bits(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(name: str) -> RunResult:
        return run_sequential(_spec(tiny, tmp_path / name, *ROUNDS))

    expected = _bits(read(job("whole").path))
    # A round of five has two shards, four updates and their application.
    for number, calls in enumerate((1, 3, 8, 12, 14)):
        with monkeypatch.context() as patch:
            _stopped_after(calls, patch)
            with pytest.raises(Stopped):
                job(str(number))
        assert _bits(read(job(str(number)).path)) == expected


@pytest.mark.parametrize("kind", ["attributions", "neurons", "update", "metrics", "edits"])
def test_a_damaged_part_is_made_again(tiny: TinyJobs, tmp_path: Path, kind: str) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_sequential(_spec(tiny, whole, *ROUNDS))
    expected = _bits(read(whole))
    shutil.copytree(whole, again)
    path = read(again).files(kind)[1]
    path.write_bytes(path.read_bytes()[:-3])
    run_sequential(_spec(tiny, again, *ROUNDS))
    assert _bits(read(again)) == expected


def test_facts_without_an_answer_or_a_neuron_of_their_own_fail_alone(
    tiny: TinyJobs, tmp_path: Path
) -> None:
    content = records(8)
    del content[3]["requested_rewrite"]["target_true"]
    run = read(run_batch_edit(_spec(tiny, tmp_path / "run", requests=content)).path)
    failed = {r["case_id"]: r["reason"] for r in run.edits().to_pylist() if r["status"] == "failed"}
    assert list(failed) == ["3"] and "method.kn.old_answer: argmax" in failed["3"]
    own = "method.kn={steps: 2, old_answer: argmax, shared_by: 0}"
    run = read(run_batch_edit(_spec(tiny, tmp_path / "own", own, requests=content)).path)
    rows = run.neurons().to_pylist()
    assert all(row["is_edited"] == (row["shared_by"] == 0.0) for row in rows)
    kept = {row["case_id"] for row in rows if row["is_edited"]}
    statuses = {row["case_id"]: row["status"] for row in run.edits().to_pylist()}
    assert {name for name, status in statuses.items() if status == "applied"} == kept
    assert 0 < len(kept) < 8


def test_a_batch_without_any_neuron_ends_the_job(tiny: TinyJobs, tmp_path: Path) -> None:
    content = records(3)
    for record in content:
        del record["requested_rewrite"]["target_true"]
    with pytest.raises(JobFailedError, match="no request has a neuron"):
        run_batch_edit(_spec(tiny, tmp_path / "run", requests=content))


@pytest.mark.parametrize("operation", ["erase", "enhance"])
def test_what_writes_no_answer_is_not_judged_by_it(
    tiny: TinyJobs, tmp_path: Path, operation: str
) -> None:
    kn = f"method.kn={{steps: 1, operation: {operation}, shared_by: 1}}"
    result = run_batch_edit(_spec(tiny, tmp_path / "run", kn, "output.on_divergence=stop"))
    assert result.counts["applied"] == 12


def test_the_report_shows_the_neurons_and_unedit_refuses(tiny: TinyJobs, tmp_path: Path) -> None:
    result = run_batch_edit(_spec(tiny, tmp_path / "run", requests=records(6)))
    page = Path(write_report([result.path])).read_text(encoding="utf-8")
    assert "Neurons by layer" in page and (result.path / "report" / "neurons.svg").exists()
    with pytest.raises(InputError, match="kn cannot be told apart"):
        unedit(result.path, ["0"], tmp_path / "out")


def test_paraphrases_are_either_asked_or_judged_by(tiny: TinyJobs, tmp_path: Path) -> None:
    asked = "method.kn={steps: 1, paraphrases: true, shared_by: 1}"
    with pytest.raises(InputError, match="cannot be judged"):
        _spec(tiny, tmp_path / "run", asked)
    spec = _spec(tiny, tmp_path / "run", asked, "evaluation.probes=[rewrite]", requests=records(6))
    prompts = read(run_batch_edit(spec).path).attributions()["prompts"].to_pylist()
    assert set(prompts) == {len(CONTEXTS) + 1}


def test_twenty_facts_of_the_embedded_world(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "requests": {"limit": 20},
        "method": {"name": "kn"},
        "cluster": {"engine": "in_process"},
        "output": {"path": str(tmp_path / "run"), "on_divergence": "keep"},
    }
    (_, scores) = run_batch_edit(parse_spec(content, "the test")).summary["evaluation"]["rounds"]
    print({name: scores[name]["score"] for name in ("ES", "PS", "NS")})
    # It is no method for batches: docs/methods.md says what it reaches.
    assert scores["ES"]["score"] >= 50
