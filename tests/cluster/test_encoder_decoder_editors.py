"""Editors of a T5 as whole jobs: batch, rounds, rollback, resuming, saving and loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from pipeline import (
    apply_updates,
    export_model,
    load_adapter,
    load_serac,
    run_batch_edit,
    run_sequential,
    run_survey,
    run_training,
)
from pipeline.cluster.assessing import run_assess
from pipeline.editing.serac.serving import SeracAnswerModel
from pipeline.results import Run, read
from pipeline.spec import JobSpec, parse_spec
from pipeline.unediting import unedit
from tests import encoder_decoders
from tests.oracles import encoder_decoder as oracle
from tests.oracles.memit import Edit
from tests.tiny_jobs import TinyJobs, changed, digests, records, stopped_after

PATCHES = {
    "steps": 12,
    "least_steps": 4,
    "check_every": 4,
    "memory_queries": 60,
    "watched_queries": 20,
    "memory_top": 9,
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "t_patcher": ("t5_gated", PATCHES),
    "calinet": ("t5", {"slots": 3, "epochs": 3}),
    "mend": ("t5_gated", {"rank": 4, "edit_rate": 0.01}),
    "malmen": ("t5", {"rank": 4, "edit_rate": 0.01}),
    "ke": ("t5_gated", {"condition_size": 8, "hidden_size": 8, "lstm_size": 4}),
    "serac": ("t5", {"embedding_size": 8}),
}
"""Each with the model that it edits here, and its own settings."""

TRAIN: dict[str, dict[str, Any]] = {
    "mend": {"batch_size": 2, "accumulate": 1},
    "malmen": {"batch_size": 4},
    "ke": {"accumulate": 1, "warm_up": 0},
    "serac": {"batch_size": 2, "accumulate": 1},
}
ADAPTERS = ("t_patcher", "calinet")
ROUNDS = ("rounds={size: 1, count: 2, evaluate: [current]}", "output.on_divergence=keep")
APART = ROUNDS[0].replace("[current]}", "[current], evaluate_every: 1, rollback: true}")


def _some(*quick: str, but: str = "") -> list[Any]:
    """All methods but these; the quick ones in every run of the tests."""
    chosen = [name for name in METHODS if name not in but.split()]
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in chosen
    ]


class Jobs:
    """Specs of jobs on tiny T5s; editors that are trained first are so when they are needed."""

    def __init__(self, tiny: TinyJobs, root: Path) -> None:
        self.tiny, self.root = tiny, root
        self._trained: dict[str, Run] = {}

    def model(self, method: str) -> Path:
        kind, _ = METHODS[method]
        if not (self.root / kind).exists():
            encoder_decoders.save(kind, self.root / kind)
        return self.root / kind

    def spec(self, method: str, output: Path, *changes: str) -> JobSpec:
        own = METHODS[method][1]
        if method in TRAIN:
            own = {"editor": str(self.trained(method).path / "editor")}
        return self._spec(method, own, output, *changes)

    def training(self, method: str, output: Path) -> JobSpec:
        own, settings = METHODS[method][1], TRAIN[method]
        steps = {"steps": 2, "learning_rate": 0.01, "validate_every": 2, "checkpoint_every": 1}
        changes = [f"train.{name}={value}" for name, value in {**steps, **settings}.items()]
        return self._spec(method, own, output, *changes)

    def trained(self, method: str) -> Run:
        if method not in self._trained:
            spec = self.training(method, self.root / method)
            self._trained[method] = read(run_training(spec).path)
        return self._trained[method]

    def _spec(self, method: str, own: dict[str, Any], output: Path, *changes: str) -> JobSpec:
        settings = self.tiny.settings(output, requests=records(6))
        settings["model"]["path"] = str(self.model(method))
        settings["method"] = {"name": method, method: own}
        settings["covariance"] = {"corpus": str(self.tiny.corpus)}
        return parse_spec(changed(settings, *changes), "the test")


@pytest.fixture(scope="module")
def jobs(tiny: TinyJobs, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tiny, tmp_path_factory.mktemp("encoder-decoders"))


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
    if method == "serac":
        return {**digests(run), "made": run.memory().to_pylist()}
    table = run.patches() if method == "t_patcher" else run.training()
    return {**digests(run), "made": table.drop_columns(["seconds"]).to_pylist()}


@pytest.mark.parametrize("method", _some("t_patcher", "mend", but="serac"))
def test_a_batch_is_scored_exported_loaded_and_taken_out(
    jobs: Jobs, tmp_path: Path, method: str
) -> None:
    one = ["requests.limit=1"] if method == "ke" else []
    changes = ("output.save_model=true", ROUNDS[1], "evaluation.generate=true", *one)
    result = run_batch_edit(jobs.spec(method, tmp_path / "run", *changes))
    run, words = read(result.path), encoder_decoders.tokenizer()
    model = _load(jobs.model(method))
    assert result.counts["applied"] == (1 if one else 6)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    clean = _logits(model)
    applied = apply_updates(model, run.path)
    edited, state = _logits(model), model.state_dict()
    assert not torch.equal(clean, edited)
    layers = [] if method in ADAPTERS else run.manifest["spec"]["method"]["layers"]
    names = [f"decoder.block.{layer}.layer.2.DenseReluDense.wo.weight" for layer in layers]
    assert [name for name in before if not torch.equal(before[name], state[name])] == names
    for row in run.metrics().to_pylist():
        if row["round"] == 0 and row["probe"] != "neighborhood":
            judged = oracle.judge(model, words, row["prompt"], row["target_new"])
            assert row["nll_new"] == pytest.approx(judged.nll, rel=1e-4)
            assert row["generated"] == oracle.answered(model, words, row["prompt"], 12)
    export_model(run.path, tmp_path / "exported")
    for place in (tmp_path / "exported", run.path / "model"):
        other = _load(place)
        if method in ADAPTERS:
            load_adapter(other, place)
        assert torch.equal(_logits(other), edited)
        assert all(torch.equal(state[n], weight) for n, weight in other.state_dict().items())
    applied.revert()
    assert torch.equal(_logits(model), clean)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_memory_is_exported_and_served(jobs: Jobs, tmp_path: Path) -> None:
    changes = ("evaluation.generate=true", "evaluation.generate_tokens=4", ROUNDS[1])
    run = read(run_batch_edit(jobs.spec("serac", tmp_path / "run", *changes)).path)
    assert run.memory().num_rows == 6
    export_model(run.path, tmp_path / "out")
    served, words = load_serac(tmp_path / "out"), encoder_decoders.tokenizer()
    assert isinstance(served, SeracAnswerModel)
    rewrites = [row for row in run.metrics().to_pylist() if row["probe"] == "rewrite"]
    options = {"max_new_tokens": 4, "do_sample": False}
    for row in rewrites:
        asked = words(row["prompt"], return_tensors="pt")
        labels = words(row["target_new"], return_tensors="pt")["input_ids"]
        model = served.base if row["round"] == -1 else served
        assert row["nll_new"] == pytest.approx(float(model(**asked, labels=labels).loss), rel=1e-4)
        (ids,) = model.generate(**asked, **options, use_cache=model is served)
        assert words.decode(ids, skip_special_tokens=True) == row["generated"]
    before, after = ([r["nll_new"] for r in rewrites if r["round"] == n] for n in (-1, 0))
    assert before != after
    unedit(run.path, ["1", "4"], tmp_path / "less")
    held = load_serac(tmp_path / "less" / "model").router.memory
    assert sorted(entry.key for entry in held) == ["0", "2", "3", "5"]


@pytest.mark.parametrize("method", _some("calinet", "serac"))
def test_rolled_back_every_round_is_the_batch_of_its_own_edit(
    jobs: Jobs, tmp_path: Path, method: str
) -> None:
    apart = read(run_sequential(jobs.spec(method, tmp_path / "apart", APART, ROUNDS[1])).path)
    own = ("requests.offset=1", "requests.limit=1", ROUNDS[1])
    batch = read(run_batch_edit(jobs.spec(method, tmp_path / "batch", *own)).path)
    for ours, theirs in zip(apart.updates(1), batch.updates(), strict=True):
        assert _tensors(ours) == _tensors(theirs) != {}


def test_a_survey_has_what_can_be_done_and_says_what_cannot(jobs: Jobs, tmp_path: Path) -> None:
    mend = {"name": "mend", "mend": {"editor": str(jobs.trained("mend").path / "editor")}}
    editors = [
        {"name": "ft", "layers": [1, 3], "ft": {"epochs": 2}},
        mend,
        {"name": "t_patcher", "t_patcher": PATCHES},
        {"name": "calinet", "calinet": {"slots": 3, "epochs": 3}},
        {"name": "memit", "layers": [1]},
        {"name": "rome", "layers": [1]},
    ]
    settings = jobs.tiny.settings(tmp_path / "run", requests=records(6))
    settings["model"]["path"] = str(jobs.model("mend"))
    settings |= {"method": {}, "covariance": {"corpus": str(jobs.tiny.corpus)}}
    sizes = {"single": {"facts": 2}, "batch": {"sizes": [3]}, "sequence": None}
    result = run_survey(parse_spec({**settings, "survey": {"editors": editors, **sizes}}, "test"))
    assert not result.failed
    rows = result.table.to_pylist()
    cells = {(row["editor"], row["setting"]): row for row in rows}
    assert len(cells) == 2 * len(editors)
    for (editor, setting), row in cells.items():
        assert (row["status"] == "done") == (editor not in ("memit", "rome")), (editor, setting)
        if row["status"] != "done":
            assert row["status"] == "impossible"
            assert f"{editor} edits decoder-only models, and" in row["reason"]
    measured = {(r["editor"], r["setting"], r["measure"]): r["value"] for r in rows}
    (place,) = (run for run in result.runs if run.endswith("/ft/batch-3"))
    scores = read(place).metrics().to_pylist()
    exact = [row["exact"] for row in scores if row["round"] == 0 and row["probe"] == "rewrite"]
    assert len(exact) == 3 and measured["ft", "batch", "reliability"] == 100 * sum(exact) / 3


def _tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("method", _some("t_patcher", "serac"))
def test_stopped_and_resumed_rounds_have_the_same_bits(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def job(name: str) -> Run:
        return read(run_sequential(jobs.spec(method, tmp_path / name, *ROUNDS)).path)

    jobs.spec(method, tmp_path)
    with monkeypatch.context() as patch:
        stopped_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            job("stopped")
    assert _bits(job("stopped"), method) == _bits(job("whole"), method)


@pytest.mark.parametrize("method", _some("mend", but="t_patcher calinet"))
def test_a_training_goes_on_to_the_same_editor(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    spec = jobs.training(method, tmp_path / "run")
    with monkeypatch.context() as patch:
        stopped_after(2 if method == "malmen" else 1, patch)
        with pytest.raises(KeyboardInterrupt):
            run_training(spec)
    assert read(run_training(spec).path).path.exists()
    editors = [read(path).path / "editor" / "editor.safetensors" for path in (
        tmp_path / "run", jobs.trained(method).path)]  # fmt: skip
    assert editors[0].read_bytes() == editors[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_workers_give_the_bits_of_one_process(
    jobs: Jobs, tmp_path: Path, local_ray: None, method: str
) -> None:
    cluster = "cluster={engine: ray, workers: 2, shard_size: 2, reducer_threads: 1}"
    # ke makes one edit at a time.
    size = "rounds.size=1" if method == "ke" else "rounds.size=3"
    here = run_sequential(jobs.spec(method, tmp_path / "alone", *ROUNDS, size))
    there = run_sequential(jobs.spec(method, tmp_path / "ray", *ROUNDS, size, cluster))
    assert _bits(read(here.path), method) == _bits(read(there.path), method)


def test_facts_are_assessed(jobs: Jobs, tmp_path: Path) -> None:
    spec = jobs.spec("calinet", tmp_path / "run", "assess={prompts: 2}")
    run = read(run_assess(spec).path)
    model, words = encoder_decoders.build("t5", torch.float32), encoder_decoders.tokenizer()
    rows = run.assessment().to_pylist()
    assert len(rows) == 6
    for row in rows:
        nll = oracle.judge(model, words, row["prompt"], row["object"]).nll
        likely = torch.tensor(-nll * len(words(row["object"])["input_ids"])).exp()
        assert row["probability"] == pytest.approx(float(likely), rel=1e-3)
