"""Editors of a T5 as whole jobs: batch, rounds, rollback, resuming, saving and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from pipeline import apply_updates, export_model, load_adapter, run_batch_edit, run_sequential
from pipeline.cluster.assessing import run_assess
from pipeline.results import Run, read
from pipeline.results.updates import read_update
from pipeline.spec import JobSpec, parse_spec
from tests import encoder_decoders
from tests.oracles import encoder_decoder as oracle
from tests.oracles.memit import Edit
from tests.tiny_jobs import TinyJobs, changed, digests, records, stopped_after

METHODS = {
    "t_patcher": {
        "name": "t_patcher",
        "t_patcher": {
            "steps": 12,
            "least_steps": 4,
            "check_every": 4,
            "memory_queries": 60,
            "watched_queries": 20,
            "memory_top": 9,
        },
    },
    "calinet": {"name": "calinet", "calinet": {"slots": 3, "epochs": 3}},
}
ROUNDS = ("rounds={size: 2, count: 2, evaluate: [current]}", "output.on_divergence=keep")
APART = ROUNDS[0].replace("[current]}", "[current], evaluate_every: 1, rollback: true}")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoder-decoders")
    for kind in encoder_decoders.KINDS:
        encoder_decoders.save(kind, root / kind)
    return {kind: root / kind for kind in encoder_decoders.KINDS}


def _spec(tiny: TinyJobs, model: Path, method: str, output: Path, *changes: str) -> JobSpec:
    settings = tiny.settings(output, requests=records(6))
    settings["model"]["path"] = str(model)
    settings["method"] = METHODS[method]
    settings["covariance"] = {"corpus": str(tiny.corpus)}
    return parse_spec(changed(settings, *changes), "the test")


def _load(place: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(place, dtype=torch.float32).eval()


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    words = encoder_decoders.tokenizer()
    said = [(one.prompt.replace("{}", one.subject), one.target_new) for one in _edits(2)]
    asked = words([prompt for prompt, _ in said], return_tensors="pt", padding=True)
    labels = words([target for _, target in said], return_tensors="pt", padding=True)["input_ids"]
    logits: Tensor = model(**asked, labels=labels).logits
    return logits


def _edits(count: int) -> list[Edit]:
    rewrites = [record["requested_rewrite"] for record in records(count)]
    return [Edit(r["prompt"], r["subject"], r["target_new"]["str"]) for r in rewrites]


def _bits(run: Run, method: str) -> dict[str, Any]:
    table = run.patches() if method == "t_patcher" else run.training()
    return {**digests(run), "made": table.drop_columns(["seconds"]).to_pylist()}


@pytest.mark.parametrize(("method", "kind"), [("t_patcher", "t5_gated"), ("calinet", "t5")])
def test_neurons_beside_the_decoder_are_exported_loaded_and_taken_out(
    tiny: TinyJobs, models: dict[str, Path], tmp_path: Path, method: str, kind: str
) -> None:
    changes = ("output.save_model=true", "evaluation.generate=true")
    result = run_batch_edit(_spec(tiny, models[kind], method, tmp_path / "run", *changes))
    run, model, words = read(result.path), _load(models[kind]), encoder_decoders.tokenizer()
    assert result.counts["applied"] == 6
    assert [path.name for path in run.updates()] == ["layer-00003.safetensors"]
    if method == "t_patcher":
        assert run.manifest["queries"]["count"] == 80
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    clean = _logits(model)
    applied = apply_updates(model, run.path)
    edited = _logits(model)
    assert not torch.equal(clean, edited)
    for row in run.metrics().to_pylist():
        if row["round"] == 0 and row["probe"] != "neighborhood":
            judged = oracle.judge(model, words, row["prompt"], row["target_new"])
            assert row["nll_new"] == pytest.approx(judged.nll, rel=1e-4)
            assert row["generated"] == oracle.answered(model, words, row["prompt"], 12)
    applied.revert()
    assert torch.equal(_logits(model), clean)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    export_model(run.path, tmp_path / "exported")
    for place in (tmp_path / "exported", run.path / "model"):
        plain = _load(place)
        assert all(torch.equal(before[name], weight) for name, weight in plain.state_dict().items())
        load_adapter(plain, place)
        assert torch.equal(_logits(plain), edited)


@pytest.mark.parametrize("method", METHODS)
def test_rolled_back_every_round_is_the_batch_of_its_own_edits(
    tiny: TinyJobs, models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    given = tiny, models["t5"], method
    apart = read(run_sequential(_spec(*given, tmp_path / "apart", APART)).path)
    own = ("requests.offset=2", "requests.limit=2", ROUNDS[1])
    batch = read(run_batch_edit(_spec(*given, tmp_path / "batch", *own)).path)
    for ours, theirs in zip(apart.updates(1), batch.updates(), strict=True):
        mine, its = read_update(ours)[1], read_update(theirs)[1]
        assert all(torch.equal(part, its.parts[name]) for name, part in mine.parts.items())


@pytest.mark.parametrize("method", METHODS)
def test_stopped_and_resumed_rounds_have_the_same_bits(
    tiny: TinyJobs,
    models: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    def job(name: str) -> Run:
        spec = _spec(tiny, models["t5_gated"], method, tmp_path / name, *ROUNDS)
        return read(run_sequential(spec).path)

    with monkeypatch.context() as patch:
        stopped_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            job("stopped")
    assert _bits(job("stopped"), method) == _bits(job("whole"), method)


def test_facts_are_assessed(tiny: TinyJobs, models: dict[str, Path], tmp_path: Path) -> None:
    spec = _spec(tiny, models["t5"], "calinet", tmp_path / "run", "assess={prompts: 2}")
    run = read(run_assess(spec).path)
    model, words = encoder_decoders.build("t5", torch.float32), encoder_decoders.tokenizer()
    rows = run.assessment().to_pylist()
    assert len(rows) == 6
    for row in rows:
        nll = oracle.judge(model, words, row["prompt"], row["object"]).nll
        likely = torch.tensor(-nll * len(words(row["object"])["input_ids"])).exp()
        assert row["probability"] == pytest.approx(float(likely), rel=1e-3)
