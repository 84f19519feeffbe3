"""Several studies side by side on shared workers: the bits of each alone, and work done once."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import JobSpec, run_comparison, run_sequential
from pipeline.cluster.host import WorkerHost
from pipeline.cluster.hosts import StudiesEnded
from pipeline.cluster.plan import make_plan
from pipeline.cluster.sharing import Sharing, values_key
from pipeline.cluster.worker import EditWorker
from pipeline.editing.update import Update
from pipeline.errors import InputError, JobFailedError
from pipeline.results import read
from pipeline.spec.variants import variants
from tests.tiny_jobs import TinyJobs, digests, records

ROUNDS = (
    "rounds={size: 4, count: 3, evaluate_every: 2, evaluate: [current, all_past, untouched],"
    " untouched_sample: 2}"
)
METHODS = (
    "compare.methods=[{}, {name: memit_accumulated},"
    " {name: alphaedit, alphaedit: {threshold: 0.5, threshold_is: relative}}]"
)
MANY = records(15)  # three rounds of 4, 3 left over


def _spec(tiny: TinyJobs, output: Path, *changes: str) -> JobSpec:
    return tiny.spec(output, ROUNDS, *changes, requests=MANY)


def _alone(tiny: TinyJobs, output: Path, spec: JobSpec) -> list[dict[str, Any]]:
    """What each study of a comparison leaves when it is run by itself."""
    return [
        digests(read(run_sequential(study.at(output / study.run_path.name)).path))
        for study in variants(spec)
    ]


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often workers were asked for what."""
    seen: Counter[str] = Counter()
    for name in ("values", "evaluate", "covariance"):
        original = getattr(EditWorker, name)

        def counted(
            self: EditWorker, *args: Any, _name: str = name, _call: Any = original, **kwargs: Any
        ) -> Any:
            seen[f"{_name} {kwargs.get('round', '')}".strip()] += 1
            return _call(self, *args, **kwargs)

        monkeypatch.setattr(EditWorker, name, counted)
    return seen


# --- the same bits, with less work --------------------------------------------------------------


def test_side_by_side_every_study_has_the_bits_that_it_has_alone(
    tiny: TinyJobs, tmp_path: Path, searched: Counter[str]
) -> None:
    spec = _spec(tiny, tmp_path / "together", METHODS)
    results = run_comparison(spec)
    together = dict(searched)
    assert [result.path.name for result in results] == ["memit", "memit_accumulated", "alphaedit"]
    assert together["values 0"] == 2, "one search of the first round for all three"
    assert together["values 1"] == together["values 2"] == 6
    searched.clear()
    found = [digests(read(result.path)) for result in results]
    assert [repr(entry) for entry in found] == [
        repr(entry) for entry in _alone(tiny, tmp_path / "alone", spec)
    ]
    assert searched["values 0"] == 6 and searched["evaluate -1"] == 3 * together["evaluate -1"]


def test_seeds_and_labels_name_the_run_directories(tiny: TinyJobs, tmp_path: Path) -> None:
    changes = [
        "compare={methods: [{label: plain}, {name: emmet, wrappers: [rect]}], seeds: [3, 4]}",
        "rounds={size: 4, count: 1, order: shuffled}",
        "evaluation.probes=[rewrite]",
    ]
    results = run_comparison(tiny.spec(tmp_path / "runs", *changes, requests=records(6)))
    names = ["plain-seed3", "plain-seed4", "emmet-rect-seed3", "emmet-rect-seed4"]
    assert [result.path for result in results] == [tmp_path / "runs" / name for name in names]
    specs = [read(result.path).manifest["spec"] for result in results]
    assert [spec["name"] for spec in specs] == ["plain", "plain", "emmet-rect", "emmet-rect"]
    assert [spec["seed"] for spec in specs] == [3, 4, 3, 4]
    edited = [sorted(read(result.path).values()["case_id"].to_pylist()) for result in results]
    assert edited[0] == edited[2] != edited[1] == edited[3]


def test_a_comparison_is_gone_on_with(
    tiny: TinyJobs, tmp_path: Path, searched: Counter[str]
) -> None:
    """One study complete, one begun, one not there yet."""
    spec = _spec(tiny, tmp_path / "runs", METHODS)
    expected = _alone(tiny, tmp_path / "alone", spec)
    first, second, _ = variants(spec)
    run_sequential(first)
    run_sequential(second)
    (second.run_path / "summary.json").unlink()
    (second.run_path / "updates" / "round=00002" / "layer-00001.safetensors").unlink()
    searched.clear()
    results = run_comparison(spec)
    assert repr([digests(read(result.path)) for result in results]) == repr(expected)
    assert searched["values 0"] == 0, "the second study holds them, for the third"
    searched.clear()
    assert [result.summary for result in run_comparison(spec)] == [r.summary for r in results]
    assert not searched, "it is complete"


def test_what_a_search_does_not_follow_from_is_shared() -> None:
    def key(**settings: Any) -> str:
        method = {"layers": [0, 1], "covariance_weight": 5.0, "contexts": ["{}"], **settings}
        method = {"value": dict.fromkeys(("steps",), 3), **method}
        value = {"learning_rate": 0.5, "weight_decay": 0.5, "kl_weight": 0.1, "clamp_norm": 1.0}
        method["value"] = {**value, "stop_loss": 0.1, **method["value"]}
        return values_key(JobSpec.model_validate({"method": method}))

    same = {"alphaedit": {"name": "alphaedit"}, "rect": {"wrappers": ["rect"]}}
    same["weight"] = {"covariance_weight": 7.0}
    same["rome"] = {"name": "rome", "layers": [1]}  # it searches as MEMIT does
    assert {key(**settings) for settings in same.values()} == {key()}
    others = [
        {"wrappers": ["nas"], "nas": {"anchor_norm": 2.0}},
        {"value": {"steps": 4}},
        {"layers": [0]},
        {"contexts": ["{}", "A. {}"]},
    ]
    assert len({key(), *(key(**settings) for settings in others)}) == 1 + len(others)


# --- one replica --------------------------------------------------------------------------------


def test_studies_on_one_replica_do_not_see_each_other(tiny: TinyJobs, tmp_path: Path) -> None:
    specs = [make_plan(_spec(tiny, tmp_path / "run", f"seed={n}")).spec for n in range(2)]
    host = WorkerHost(specs, 1, at_once=2)
    weight = host.worker(0).model.oriented_weight(0)
    pristine = weight.clone()
    updates = [Update.of(torch.full(tuple(weight.shape), size)) for size in (0.25, -0.5)]
    for study, update in enumerate(updates):
        host.call(study, "apply", 0, update, version=0)
        assert torch.equal(weight, pristine + update.matrix())
    host.call(0, "apply", 0, updates[0], version=1)
    assert torch.equal(weight, pristine + 2 * updates[0].matrix())
    host.call(1, "peak_memory")
    assert torch.equal(weight, pristine + updates[1].matrix())
    assert [host.worker(study).weights.version for study in range(2)] == [2, 1]


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_study_that_fails_leaves_the_others_going(tiny: TinyJobs, tmp_path: Path) -> None:
    """Below every eigenvalue there is no direction to edit."""
    methods = "compare.methods=[{name: alphaedit, alphaedit: {threshold: 1.e-30}}, {}]"
    spec = _spec(tiny, tmp_path / "runs", methods)
    with pytest.raises(JobFailedError, match=r"1 of 2 studies ended early; alphaedit: layer 0"):
        run_comparison(spec)
    assert read(tmp_path / "runs" / "memit").manifest["status"] == "finished"
    assert read(tmp_path / "runs" / "alphaedit").manifest["status"] == "failed"


def test_work_left_by_an_error_is_done_by_the_next_study() -> None:
    sharing, seen = Sharing(), []
    with pytest.raises(OSError, match="full"), sharing.turn("a") as twin:
        raise OSError("full")
    with sharing.turn("a") as twin:
        seen.append(twin)
    assert seen == [None]


def test_told_to_stop_all_studies_end_and_can_be_gone_on_with(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = _spec(tiny, tmp_path / "runs", METHODS)
    expected = _alone(tiny, tmp_path / "alone", spec)
    join, calls = threading.Thread.join, 0

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            join(self, 0.3)
            raise KeyboardInterrupt
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(spec)
    assert not issubclass(StudiesEnded, Exception), "a study must not take it for a failure"
    begun = (tmp_path / "runs").glob("*/manifest.json")
    assert {read(path.parent).manifest["status"] for path in begun} <= {"interrupted", "finished"}
    results = run_comparison(spec)
    assert repr([digests(read(result.path)) for result in results]) == repr(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["compare.methods=[{name: memmit}]"], r"compare.methods\[0\]: method.name: .*memmit"),
        (["compare.methods=[{}, {rect: {kep: 1}}]"], r"methods\[1\]: method.rect.kep: unknown"),
        (["compare.methods=[{}, {}]"], "2 methods, of which several are called 'memit'"),
        (["compare.methods=[{label: a/b}]"], r"methods\[0\].label: name: "),
        (["compare={seeds: [1, 1]}"], r"compare.seeds: \[1, 1\] names one twice"),
        (["compare={}", "rounds=null"], "give rounds.size too"),
    ],
)
def test_a_wrong_comparison_gets_one_line(
    tiny: TinyJobs, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_comparison(_spec(tiny, tmp_path / "runs", *changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_a_spec_of_several_studies_is_not_taken_for_one(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run it with `editfleet sequential`"):
        run_sequential(_spec(tiny, tmp_path / "runs", METHODS))
