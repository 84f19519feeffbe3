"""Methods that make adapters as whole jobs: bits, failures, interruptions, export."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import apply_updates, export_model, load_adapter, run_batch_edit, run_sequential
from pipeline.cluster.engine import Call, InProcessEngine
from pipeline.cluster.run import RunResult
from pipeline.editing.adapters import NeuronBank
from pipeline.errors import FingerprintMismatchError, InputError
from pipeline.report.page import write_report
from pipeline.report.status import run_status
from pipeline.results import Run, read
from pipeline.results.updates import read_update
from pipeline.spec import JobSpec, parse_spec
from pipeline.unediting import unedit
from tests import families
from tests.tiny_jobs import TinyJobs, changed, digests, records

PATCHES = (
    "method={name: t_patcher, t_patcher: {steps: 12, least_steps: 4, check_every: 4,"
    " memory_queries: 60, watched_queries: 20, memory_top: 9}}",
    "evaluation.probes=[rewrite]",
)
ROUNDS = ("rounds={size: 4, evaluate: [current]}", "output.on_divergence=keep")
TEN = records(10)


def _spec(tiny: TinyJobs, output: Path, *changes: str, **choices: Any) -> JobSpec:
    return tiny.spec(output, *PATCHES, *changes, **{"requests": TEN, **choices})


def _bits(run: Run) -> dict[str, Any]:
    patches = run.patches().drop_columns(["seconds"]).sort_by("case_id")
    pieces = [path.read_bytes() for path in run.files("piece")]
    return {**digests(run), "patches": patches.to_pylist(), "pieces": pieces}


def _banks(run: Run) -> list[NeuronBank]:
    found = [read_update(path)[1] for path in run.updates()]
    assert all(isinstance(bank, NeuronBank) for bank in found)
    return found  # type: ignore[return-value]


@torch.no_grad()
def _logits(model: torch.nn.Module, directory: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(families.SENTENCES[:4], return_tensors="pt", padding=True)
    return model(**batch).logits


def _load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_a_batch_is_patched_exported_merged_and_taken_out(tiny: TinyJobs, tmp_path: Path) -> None:
    result = run_batch_edit(_spec(tiny, tmp_path / "run", "output.save_model=true"))
    run = read(result.path)
    assert result.counts["applied"] == 10
    assert [path.name for path in run.updates()] == ["layer-00003.safetensors"]
    (bank,) = _banks(run)
    rows = run.patches()
    assert bank.num_neurons == sum(rows["patches"].to_pylist()) > 0 and rows.num_rows == 10
    assert set(rows["case_id"].to_pylist()) == set(run.edits()["case_id"].to_pylist())
    assert run.manifest["queries"]["count"] == 80 and run.manifest["covariance"] is None
    phases = {phase.name: (phase.done, phase.total) for phase in run_status(run.path).phases}
    assert phases["training"] == (10, 10) and phases["insertion"] == (1, 1)

    model = _load(tiny.model())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clean = _logits(model, tiny.model())
    applied = apply_updates(model, run.path)
    edited = _logits(model, tiny.model())
    assert not torch.equal(clean, edited)
    applied.revert()
    assert torch.equal(_logits(model, tiny.model()), clean)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())

    export_model(run.path, tmp_path / "beside")
    for place in (tmp_path / "beside", run.path / "model"):
        plain = _load(place)
        assert torch.equal(_logits(plain, place), clean)
        loaded = load_adapter(plain, place)
        assert torch.equal(_logits(plain, place), edited)
        loaded.remove()
        assert torch.equal(_logits(plain, place), clean)
    export_model(run.path, tmp_path / "merged", merge=True)
    merged = _logits(_load(tmp_path / "merged"), tmp_path / "merged")
    assert torch.allclose(merged, edited, atol=1e-4)
    assert "modules beside" in (tmp_path / "beside" / "README.md").read_text()
    page = Path(write_report([run.path])).read_text(encoding="utf-8")
    assert "How the training of patches ended" in page
    with pytest.raises(InputError, match="t_patcher"):
        unedit(run.path, ["0"], tmp_path / "out")


def test_ray_gives_the_bits_of_one_process(tiny: TinyJobs, tmp_path: Path) -> None:
    many = records(20)
    here = run_sequential(_spec(tiny, tmp_path / "alone", ROUNDS[1],
                                "rounds={size: 17, count: 1}", requests=many))  # fmt: skip
    cluster = "cluster={engine: ray, workers: 2, shard_size: 3, reducer_threads: 1}"
    there = run_sequential(_spec(tiny, tmp_path / "ray", ROUNDS[1], cluster,
                                 "rounds={size: 17, count: 1}", requests=many))  # fmt: skip
    assert len(read(here.path).files("piece")) == 2
    assert _bits(read(here.path)) == _bits(read(there.path))


def test_later_rounds_remember_and_build_on_earlier_ones(tiny: TinyJobs, tmp_path: Path) -> None:
    run = read(run_sequential(_spec(tiny, tmp_path / "run", *ROUNDS)).path)
    banks = _banks(run)
    assert len(banks) == 3 and all("queries" in bank.parts for bank in banks)
    forgetful = "method.t_patcher.update_memory=false"
    other = _banks(read(run_sequential(_spec(tiny, tmp_path / "b", *ROUNDS, forgetful)).path))
    assert torch.equal(banks[0].parts["keys"], other[0].parts["keys"])
    assert not torch.equal(banks[1].parts["keys"], other[1].parts["keys"])
    model = _load(tiny.model())
    applied = apply_updates(model, run.path, round=1)
    ((layer, joined),) = applied.weights.adapters
    assert layer == 3
    assert torch.equal(joined.parts["keys"], torch.cat([b.parts["keys"] for b in banks[:2]]))


class Stopped(Exception):
    """Ends a job where a test wants it to."""


def _stopped_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, left = InProcessEngine.submit, [calls]

    def counted(self: InProcessEngine, worker: int, method: str, *a: Any, **k: Any) -> Call:
        left[0] -= method in ("adapt", "apply", "evaluate")
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
    for number, calls in enumerate((1, 2, 5)):
        with monkeypatch.context() as patch:
            _stopped_after(calls, patch)
            with pytest.raises(Stopped):
                job(str(number))
        assert _bits(read(job(str(number)).path)) == expected


@pytest.mark.parametrize("kind", ["piece", "patches", "update", "metrics", "edits"])
def test_a_damaged_part_is_made_again(tiny: TinyJobs, tmp_path: Path, kind: Any) -> None:
    whole = tmp_path / "whole"
    run_sequential(_spec(tiny, whole, *ROUNDS))
    expected, again = _bits(read(whole)), tmp_path / "again"
    shutil.copytree(whole, again)
    path = read(again).files(kind)[1]
    path.write_bytes(path.read_bytes()[:-3])
    run_sequential(_spec(tiny, again, *ROUNDS))
    assert _bits(read(again)) == expected


def test_finished_pieces_are_not_made_twice(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _spec(tiny, tmp_path / "run", requests=records(20))
    with monkeypatch.context() as patch:
        _stopped_after(2 + 2, patch)  # two shards of the baseline, two pieces
        with pytest.raises(Stopped):
            run_batch_edit(spec)
    asked: list[str] = []
    submit = InProcessEngine.submit

    def noted(self: InProcessEngine, worker: int, method: str, *a: Any, **k: Any) -> Call:
        asked.append(method)
        return submit(self, worker, method, *a, **k)

    monkeypatch.setattr(InProcessEngine, "submit", noted)
    run_batch_edit(spec)
    assert asked.count("adapt") < 2


def test_a_request_that_has_no_loss_fails_alone(tiny: TinyJobs, tmp_path: Path) -> None:
    content = records(6)
    content[4]["requested_rewrite"]["target_new"] = {"str": "Жук"}
    spec = _spec(tiny, tmp_path / "run", family="llama", requests=content)
    model = spec.model.model_copy(update={"path": str(tiny.broken_model())})
    result = run_batch_edit(spec.model_copy(update={"model": model}))
    assert (result.counts["applied"], result.counts["failed"]) == (5, 1)
    failed = [row for row in read(result.path).edits().to_pylist() if row["status"] == "failed"]
    assert failed[0]["case_id"] == "4"


def test_another_corpus_is_not_gone_on_with(tiny: TinyJobs, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    shutil.copy(tiny.corpus, corpus)
    change = f"covariance.corpus={corpus}"
    run_sequential(_spec(tiny, tmp_path / "run", *ROUNDS, change))
    path = read(tmp_path / "run").updates()[2]
    path.write_bytes(b"")
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join(line + " old" for line in lines))
    with pytest.raises(FingerprintMismatchError, match=r"the queries of covariance\.corpus"):
        run_sequential(_spec(tiny, tmp_path / "run", *ROUNDS, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("covariance={}", "its memory is made of a corpus"),
        ("method.layers=[0, 1]", "t_patcher patches one layer"),
    ],
)
def test_what_a_job_lacks_is_said(
    tiny: TinyJobs, tmp_path: Path, change: str, message: str
) -> None:
    settings = changed(tiny.settings(tmp_path / "run", requests=TEN), *PATCHES, change)
    with pytest.raises(InputError, match=message):
        run_batch_edit(parse_spec(settings, "the test"))


def test_wrappers_of_updates_are_refused(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rect acts on updates of weights"):
        _spec(tiny, tmp_path / "run", "method.wrappers=[rect]")


# --- CaliNET, whose slots all edits of a round train together -----------------------------------

SLOTS = (
    "method={name: calinet, layers: [2, 3], calinet: {slots: 5, epochs: 4, batch_size: 6}}",
    "method.contexts=['{}', 'It is old. {}']",
    "evaluation.probes=[rewrite]",
)


def _slots(tiny: TinyJobs, output: Path, *changes: str) -> JobSpec:
    return tiny.spec(output, *SLOTS, *changes, requests=records(20))


def _slot_bits(run: Run) -> dict[str, Any]:
    training = run.training().drop_columns(["seconds"]).to_pylist()
    return {**digests(run), "training": training}


def test_slots_are_trained_exported_and_taken_out(tiny: TinyJobs, tmp_path: Path) -> None:
    run = read(run_batch_edit(_slots(tiny, tmp_path / "run")).path)
    first, last = _banks(run)
    assert first.num_neurons == last.num_neurons == 5 and "queries" not in last.parts
    assert float(last.parts["values"].norm()) > 0 == float(last.parts["biases"].norm())
    losses = run.training()["loss"].to_pylist()
    assert len(losses) == 16 and losses[-1] < losses[0]
    model = _load(tiny.model())
    clean = _logits(model, tiny.model())
    applied = apply_updates(model, run.path)
    edited = _logits(model, tiny.model())
    applied.revert()
    export_model(run.path, tmp_path / "beside")
    load_adapter(model, tmp_path / "beside")
    assert torch.equal(_logits(model, tiny.model()), edited) and not torch.equal(edited, clean)
    with pytest.raises(InputError, match="calinet"):
        unedit(run.path, ["0"], tmp_path / "out")


def test_slots_have_the_same_bits_on_ray_and_when_stopped(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = ("rounds={size: 9, count: 2, evaluate: [current]}", "output.on_divergence=keep")
    expected = _slot_bits(read(run_sequential(_slots(tiny, tmp_path / "whole", *rounds)).path))
    cluster = "cluster={engine: ray, workers: 2, shard_size: 3, reducer_threads: 1}"
    there = run_sequential(_slots(tiny, tmp_path / "ray", *rounds, cluster))
    assert _slot_bits(read(there.path)) == expected
    submit, left = InProcessEngine.submit, [12]

    def counted(self: InProcessEngine, worker: int, method: str, *a: Any, **k: Any) -> Call:
        left[0] -= method == "gradients"
        if left[0] < 0:
            raise Stopped
        return submit(self, worker, method, *a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(InProcessEngine, "submit", counted)
        with pytest.raises(Stopped):
            run_sequential(_slots(tiny, tmp_path / "cut", *rounds))
    again = run_sequential(_slots(tiny, tmp_path / "cut", *rounds))
    assert _slot_bits(read(again.path)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "least_kept"),
    [
        ({"name": "t_patcher", "t_patcher": {"memory_queries": 5000}}, 90),
        ({"name": "calinet"}, 0),
    ],
    ids=["T-Patcher", "CaliNET"],
)
def test_twenty_facts_of_the_embedded_world_are_learnt(
    tmp_path: Path, method: dict[str, Any], least_kept: float
) -> None:
    content: dict[str, Any] = {
        "requests": {"limit": 20},
        "method": method,
        "covariance": {"samples": 600},
        "cluster": {"engine": "in_process"},
        "output": {"path": str(tmp_path / "run")},
    }
    result = run_batch_edit(parse_spec(content, "the test"))
    (_, scores) = result.summary["evaluation"]["rounds"]
    exact = scores["probes"]["rewrite"]["exact"]["score"]
    print({name: scores[name]["score"] for name in ("ES", "PS", "NS")}, exact)
    assert exact >= 95 and scores["NS"]["score"] >= least_kept
    if method["name"] == "calinet":
        assert read(result.path).training()["loss"].to_pylist()[-1] < 0.05
