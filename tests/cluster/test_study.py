"""Sequential studies: rounds, what is scored after them, and going on after a crash."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import apply_updates, export_model, run_batch_edit, run_sequential
from pipeline.cluster import run as run_module
from pipeline.cluster.engine import Call, InProcessEngine
from pipeline.cluster.past import PastGrams
from pipeline.cluster.plan import make_plan
from pipeline.cluster.rounds import BASELINE_ROUND
from pipeline.covariances import covariance_path
from pipeline.editing.keys import KeyWave
from pipeline.editing.update import EditedWeights
from pipeline.errors import InputError
from pipeline.methods import build_closed_form
from pipeline.models.editable import EditableModel
from pipeline.models.kernels import choose_kernels
from pipeline.prompts import tokenize_edits
from pipeline.report.status import run_status
from pipeline.results import Run, RunStore, read
from pipeline.results.keys import read_keys
from pipeline.results.seconds import read_seconds, write_seconds
from pipeline.results.updates import read_update
from pipeline.spec import parse_spec
from tests.tiny_jobs import CONTEXTS, LAYERS, TinyJobs, digests, records

ROUNDS = (
    "rounds={size: 4, count: 3, evaluate_every: 2, evaluate: [current, all_past, untouched],"
    " untouched_sample: 2}"
)
REMEMBERING = "method.name=memit_accumulated"
MANY = records(15)  # three rounds of 4, 3 left over


class Studies:
    """Studies of 15 requests that are run once."""

    def __init__(self, tiny: TinyJobs) -> None:
        self.tiny = tiny
        self._finished: dict[tuple[str, ...], Run] = {}

    def spec(self, output: Path, *changes: str) -> Any:
        return self.tiny.spec(output, ROUNDS, *changes, requests=MANY)

    def finished(self, *changes: str) -> Run:
        if changes not in self._finished:
            output = self.tiny.root / "studies" / str(len(self._finished))
            result = run_sequential(self.spec(output, *changes))
            self._finished[changes] = read(result.path)
        return self._finished[changes]


@pytest.fixture(scope="module")
def studies(tiny: TinyJobs) -> Studies:
    return Studies(tiny)


# --- rounds -------------------------------------------------------------------------------------


def _loop(studies: Studies, run: Run) -> dict[tuple[int, int], torch.Tensor]:
    """The study as a plain loop over the method's own functions: (round, layer) -> update."""
    spec = make_plan(studies.spec(run.path)).spec
    directory = studies.tiny.model()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    choose_kernels(model)
    editable, tokenizer = EditableModel(model), AutoTokenizer.from_pretrained(directory)
    weights, method = (
        EditedWeights(editable, tuple(LAYERS)),
        build_closed_form(run_spec(run).method),
    )
    past, updates = PastGrams(1), {}
    for round, shards in enumerate(make_plan(studies.spec(run.path)).rounds.shards):
        requests = [request for shard in shards for request in shard.items]
        edits = tokenize_edits(tokenizer, requests, CONTEXTS)
        z = torch.stack([value.z for value in method.find_values(editable, edits, 16)])
        wave = KeyWave(editable, edits, LAYERS[-1], max_tokens=2048)
        for layer in LAYERS:
            keys, residuals = method.keys_and_residuals(wave, layer, z)
            covariance = _covariance(studies.tiny, layer)
            penalty = method.penalty(covariance)
            equations = method.equations(penalty, len(edits), past.of(layer))
            equations.add(keys, residuals)
            update = equations.solve()
            past.add(layer, keys)
            weights.apply(layer, update.matrix())
            updates[round, layer] = update.matrix()
    assert spec.rounds is not None and weights.version == 3 * len(LAYERS)
    return updates


def run_spec(run: Run) -> Any:
    return parse_spec(run.manifest["spec"], "the run")


def _covariance(tiny: TinyJobs, layer: int) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(covariance_path(tiny.root / "covariances" / "gpt2", layer))["covariance"]


@pytest.mark.parametrize("method", ["method.name=memit", REMEMBERING])
def test_rounds_are_batches_one_after_another(studies: Studies, method: str) -> None:
    run = studies.finished(method)
    expected = _loop(studies, run)
    assert len(run.updates()) == len(expected) == 6
    for path in run.updates():
        layer, update, metadata = read_update(path)
        wanted = expected[int(metadata["round"]), layer]
        assert float((update.matrix() - wanted).norm() / wanted.norm()) < 1e-3, path


def test_a_method_that_remembers_solves_other_updates_from_round_one(studies: Studies) -> None:
    plain, remembering = studies.finished("method.name=memit"), studies.finished(REMEMBERING)
    pairs = zip(plain.updates(), remembering.updates(), strict=True)
    same = [torch.equal(*(read_update(path)[1].matrix() for path in pair)) for pair in pairs]
    assert same == [True, True, False, False, False, False]


def test_a_study_of_one_round_is_the_batch_job(tiny: TinyJobs, tmp_path: Path) -> None:
    batch = tiny.finished()
    one = read(run_sequential(tiny.spec(tmp_path / "one", "rounds={size: 12}")).path)
    assert digests(one) == digests(batch)


def test_the_first_round_is_the_batch_of_its_requests(studies: Studies, tmp_path: Path) -> None:
    study = studies.finished("method.name=memit")
    batch = read(run_batch_edit(studies.tiny.spec(tmp_path, requests=MANY[:4])).path)
    for ours, theirs in zip(study.updates(0), batch.updates(), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_weight_versions_count_the_updates_before(studies: Studies) -> None:
    run = studies.finished("method.name=memit")
    lines = [json.loads(line) for line in (run.path / "manifest.jsonl").open()]
    versions = {
        (part["kind"], part["round"]): part["weight_version"]
        for part in lines
        if "weight_version" in part
    }
    assert [versions["values", round] for round in range(3)] == [0, 2, 4]
    assert [versions.get(("metrics", round)) for round in (-1, 0, 1, 2)] == [0, None, 4, 6]


def test_stored_keys_are_those_of_the_updates(studies: Studies) -> None:
    """R K^T (lambda C + K K^T)^-1 of what is stored is the stored update."""
    run = studies.finished("method.name=memit")
    store = RunStore.open(run.path)
    edits = {row["case_id"]: row["round"] for row in run.edits().to_pylist()}
    for round in range(3):
        for layer, path in store.layers("keys", round).items():
            stored = read_keys(path)
            assert {edits[case_id] for case_id in stored.case_ids} == {round}
            keys, residuals = stored.keys_NF.double(), stored.residuals_ND.double()
            weight = run_spec(run).method.covariance_weight
            system = weight * _covariance(studies.tiny, layer) + keys.T @ keys
            expected = torch.linalg.solve(system, keys.T @ residuals).T
            update = read_update(store.layers("update", round)[layer])[1].matrix()
            assert float((update - expected).norm() / expected.norm()) < 1e-4


# --- what is scored -----------------------------------------------------------------------------


def test_what_is_scored_after_which_round(studies: Studies) -> None:
    rows = studies.finished("method.name=memit").metrics().to_pylist()
    rewrites = Counter((r["round"], r["edit_round"]) for r in rows if r["probe"] == "rewrite")
    # Every second round and the last; before the first one, all that is scored later.
    expected = {(-1, 0): 4, (-1, 1): 4, (-1, 2): 4, (1, 0): 4, (1, 1): 4}
    assert rewrites == expected | {(2, 0): 4, (2, 1): 4, (2, 2): 4}
    untouched = [row for row in rows if row["edit_round"] == -1]
    assert Counter(row["round"] for row in untouched) == {-1: 2, 1: 2, 2: 2}
    assert {row["probe"] for row in untouched} == {"neighborhood"}
    assert {row["case_id"] for row in untouched} <= {"12", "13", "14"}


def _rounds(tiny: TinyJobs, rounds: str, content: Any = None) -> Any:
    spec = tiny.spec(tiny.root / "none", rounds, requests=MANY if content is None else content)
    return make_plan(spec).rounds


def _scored(rounds: Any, round: int) -> set[int]:
    return {rounds.edit_round[probe.case_id] for probe in rounds.probes(round)}


def test_the_schedule(tiny: TinyJobs) -> None:
    listed = _rounds(tiny, "rounds={size: 3, evaluate_after: [0, 3], evaluate: [current]}")
    assert listed.evaluated == (0, 3) and len(listed.shards) == 5
    assert [_scored(listed, round) for round in (-1, 0, 1, 3, 4)] == [
        {0, 3},
        {0},
        set(),
        {3},
        set(),
    ]
    past = _rounds(tiny, "rounds={size: 3, evaluate_every: 3, evaluate: [all_past]}")
    assert past.evaluated == (2, 4)
    assert [_scored(past, round) for round in (-1, 2, 4)] == [{0, 1, 2, 3}, {0, 1}, {0, 1, 2, 3}]
    few = _rounds(tiny, "rounds={size: 3, evaluate: [all_past], past_sample: 4}")
    again = _rounds(tiny, "rounds={size: 3, evaluate: [all_past], past_sample: 4}")
    assert few.followed == again.followed and len(few.followed) == 4
    assert {few.edit_round[case_id] for case_id in few.followed} == {0, 1, 2, 3}
    assert {p.case_id for p in few.probes(BASELINE_ROUND)} == few.followed
    single = _rounds(tiny, "rounds={size: 1, evaluate_every: 100, evaluate: [current]}")
    assert len(single.shards) == 15 and single.evaluated == (14,)


def test_orders(tiny: TinyJobs) -> None:
    def cases(rounds: Any) -> list[str]:
        return [r.case_id for n in range(len(rounds.shards)) for r in rounds.requests(n)]

    def name(case_id: str, field: str) -> str:
        return str(MANY[int(case_id)]["requested_rewrite"][field])

    names = [str(number) for number in range(15)]
    assert cases(_rounds(tiny, "rounds={size: 1}")) == names
    shuffled = cases(_rounds(tiny, "rounds={size: 1, order: shuffled}"))
    assert sorted(shuffled) == sorted(names) and shuffled != names
    assert shuffled == cases(_rounds(tiny, "rounds={size: 1, order: shuffled}"))
    for order, field in (("relation", "relation_id"), ("subject", "subject")):
        found = [
            name(case, field)
            for case in cases(_rounds(tiny, f"rounds={{size: 1, order: {order}}}"))
        ]
        groups = [value for n, value in enumerate(found) if n == 0 or found[n - 1] != value]
        assert len(groups) == len(set(groups)), "each group is in one piece"
        assert groups == list(dict.fromkeys(name(case, field) for case in names))


def test_requests_that_cannot_be_edited_are_reported_once(tiny: TinyJobs, tmp_path: Path) -> None:
    """A rejected one in the first round, and a round whose only request fails goes on."""
    content = records(3)
    content[1]["requested_rewrite"]["subject"] = "Жан"
    content[2]["requested_rewrite"]["prompt"] = "no place"
    changes = [
        f"model.path={tiny.broken_model()}",
        f"covariance.path={tiny.root / 'covariances' / 'llama-broken'}",
        "rounds={size: 1, evaluate_every: 1}",
    ]
    spec = tiny.spec(tmp_path / "run", *changes, requests=content, family="llama")
    run = read(run_sequential(spec).path)
    rows = [(r["round"], r["case_id"], r["status"]) for r in run.edits().to_pylist()]
    assert rows == [(0, "0", "applied"), (0, "2", "rejected"), (1, "1", "failed")]
    assert [read_update(path)[1].norm() > 0 for path in run.updates()] == [True, True, False, False]
    before = digests(run)
    run_sequential(spec)
    assert repr(digests(read(run.path))) == repr(before)


# --- going on -----------------------------------------------------------------------------------


class CountingEngine(InProcessEngine):
    """Counts the calls of each method."""

    calls: list[str]

    def submit(self, worker: int, method: str, *args: Any, **kwargs: Any) -> Call:
        self.calls.append(method)
        return super().submit(worker, method, *args, **kwargs)


def _cut(whole: Run, output: Path, lines: int) -> Path:
    """A copy with the first parts only, as a killed driver leaves it."""
    shutil.copytree(whole.path, output)
    listing = output / "manifest.jsonl"
    kept = listing.read_bytes().splitlines(keepends=True)
    listing.write_bytes(b"".join(kept[:lines]) + b'{"name": "valu')
    (output / "summary.json").unlink()
    manifest = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    return output


def _files(run: Run) -> dict[str, bytes]:
    return {
        str(path.relative_to(run.path)): path.read_bytes()
        for kind in ("updates", "keys")
        for path in (run.path / kind).rglob("*.safetensors")
    }


@pytest.mark.parametrize(
    "name", ["values/round-00001-shard-00001", "layer=001", "updates/round=00002"]
)
def test_cut_off_anywhere_a_study_ends_the_same(
    studies: Studies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Within the values of a round, between its layers, and between keys and update."""
    whole = studies.finished(REMEMBERING)
    names = [json.loads(line)["name"] for line in (whole.path / "manifest.jsonl").open()]
    lines = next(n for n, part in enumerate(names) if name in part)
    path = _cut(whole, tmp_path / "run", lines)
    monkeypatch.setattr(CountingEngine, "calls", [], raising=False)
    monkeypatch.setattr(run_module, "InProcessEngine", CountingEngine)
    run = read(run_sequential(studies.spec(path, REMEMBERING)).path)
    assert repr(digests(run)) == repr(digests(whole)) and _files(run) == _files(whole)
    assert run.summary["evaluation"] == whole.summary["evaluation"]
    shards = sum(part.startswith("values/") for part in names[lines:])
    assert CountingEngine.calls.count("values") == shards
    assert CountingEngine.calls.count("apply") == 6
    CountingEngine.calls.clear()
    run_sequential(studies.spec(path, REMEMBERING))
    assert CountingEngine.calls == [], "it is complete"


def test_what_came_from_a_damaged_part_is_computed_again(studies: Studies, tmp_path: Path) -> None:
    whole = studies.finished(REMEMBERING)
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    damaged = path / "keys" / "round=00001" / "layer=001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    kept = path / "updates" / "round=00001" / "layer-00000.safetensors"
    before = kept.stat().st_mtime_ns
    run = read(run_sequential(studies.spec(path, REMEMBERING)).path)
    assert _files(run) == _files(whole) and repr(digests(run)) == repr(digests(whole))
    assert kept.stat().st_mtime_ns == before


def test_the_status_of_a_study(studies: Studies, tmp_path: Path) -> None:
    whole = studies.finished("method.name=memit")
    found = {phase.name: (phase.done, phase.total) for phase in run_status(whole.path).phases}
    assert found["rounds"] == (3, 3) and found["values"] == (6, 6) and found["insertion"] == (6, 6)
    cut = run_status(_cut(whole, tmp_path / "run", 9))
    assert {phase.name: phase.done for phase in cut.phases}["rounds"] <= 1


# --- the model after a round --------------------------------------------------------------------


def test_the_model_after_any_round(studies: Studies, tmp_path: Path) -> None:
    run = studies.finished("method.name=memit")
    names = [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in LAYERS]
    weights = {}
    for round in (0, 1, 2):
        model = AutoModelForCausalLM.from_pretrained(studies.tiny.model(), dtype=torch.float32)
        apply_updates(model, run.path, round=round)
        weights[round] = [model.get_parameter(name).detach().clone() for name in names]
    export_model(run.path, tmp_path / "one", round=1)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert all(
        torch.equal(exported.get_parameter(name), weight)
        for name, weight in zip(names, weights[1], strict=True)
    )
    assert "8 facts" in (tmp_path / "one" / "README.md").read_text()
    whole = AutoModelForCausalLM.from_pretrained(studies.tiny.model(), dtype=torch.float32)
    apply_updates(whole, run.path)
    assert torch.equal(whole.get_parameter(names[0]), weights[2][0])
    assert not torch.equal(weights[0][0], weights[1][0])
    with pytest.raises(InputError, match="has no round 3; its last whole one is 2"):
        export_model(run.path, tmp_path / "three", round=3)


def test_a_round_of_an_unfinished_study_can_be_exported(studies: Studies, tmp_path: Path) -> None:
    whole = studies.finished("method.name=memit")
    names = [json.loads(line)["name"] for line in (whole.path / "manifest.jsonl").open()]
    lines = next(n for n, part in enumerate(names) if "updates/round=00001" in part) + 1
    path = _cut(whole, tmp_path / "run", lines)
    export_model(path, tmp_path / "zero", round=0)
    with pytest.raises(InputError, match="has no round 1; its last whole one is 0"):
        export_model(path, tmp_path / "one", round=1)


# --- what is wrong with a spec ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ("rounds={sise: 3}", r"rounds\.sise: unknown setting; did you mean 'size'"),
        ("rounds={size: 0}", r"rounds\.size: "),
        ("rounds={order: random}", r"rounds\.order: "),
        ("rounds={evaluate_after: [3, 1]}", "evaluate_after must ascend"),
        ("rounds={evaluate: [current], past_sample: 3}", "past_sample needs all_past"),
        ("rounds={evaluate: [current, current]}", "names something twice"),
        ("rounds={size: 5, evaluate_after: [3]}", "there is no round 3: the requests make 3"),
        ("rounds={size: 5, evaluate: [untouched]}", r"untouched: no request.*rounds\.count"),
        ("rounds=null", r"rounds: .*give rounds\.size"),
    ],
)
def test_wrong_specs_are_named(tiny: TinyJobs, tmp_path: Path, rounds: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        run_sequential(tiny.spec(tmp_path / "run", rounds, requests=MANY))
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("manifest.json"))


def test_a_study_is_no_batch(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="editfleet sequential"):
        run_batch_edit(tiny.spec(tmp_path / "run", "rounds={size: 3}"))
    content = records(4)
    for record in content:
        del record["requested_rewrite"]["relation_id"]
    with pytest.raises(InputError, match=r"rounds\.order: relation"):
        _rounds(tiny, "rounds={size: 2, order: relation}", content)


def test_a_cut_line_of_seconds_is_passed_over(tmp_path: Path) -> None:
    write_seconds(tmp_path, 0, {"values": 1.5})
    with open(tmp_path / "rounds.jsonl", "ab") as file:
        file.write(b'{"round": 1, "sec')
    write_seconds(tmp_path, 1, {"values": 2.5})
    write_seconds(tmp_path, 0, {"values": 0.5})
    assert [(entry.round, entry.seconds["values"]) for entry in read_seconds(tmp_path)] == [
        (0, 0.5),
        (1, 2.5),
    ]
