"""Surveys: cells as ordinary studies, one table, and what cannot be done said in it."""

import gc
import json
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import run_sequential, run_survey
from pipeline.cli import main
from pipeline.cluster.survey import SurveyResult
from pipeline.cluster.worker import EditWorker
from pipeline.errors import DivergedError, InputError
from pipeline.evaluation.intervals import interval
from pipeline.evaluation.survey import SHARES, cost_rows
from pipeline.results import read
from pipeline.results.schemas import SURVEY
from pipeline.spec import JobSpec, parse_spec
from pipeline.spec.cells import survey_cells
from tests.tiny_jobs import TinyJobs, changed, digests, records

EDITORS = (
    "survey.editors=[{}, {name: rome, layers: [1]},"
    " {name: ft, label: ft-l, ft: {norm_constraint: 0.01, epochs: 3}}]"
)
SIZES = (
    "survey.single.facts=3",
    "survey.batch.sizes=[1, 4, 20]",
    "survey.sequence={sizes: [2, 4, 20], rounds_of: 2, at_once: 2}",
)
NINE = records(9)
ADDERS = ("kn", "t_patcher", "calinet")
COLUMNS = ("editor", "setting", "edits", "status", "measure", "value")


def _spec(tiny: TinyJobs, output: Path, *changes: str) -> JobSpec:
    settings = tiny.settings(output, requests=NINE)
    return parse_spec(changed(settings, *(changes or (EDITORS, *SIZES))), "the survey")


def _rows(table: pa.Table, **chosen: Any) -> list[dict[str, Any]]:
    return [
        row
        for row in table.to_pylist()
        if all(row[name] == value for name, value in chosen.items())
    ]


def _value(table: pa.Table, **chosen: Any) -> float:
    (row,) = _rows(table, **chosen)
    return float(row["value"])


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_these_tests_alone() -> Iterator[None]:
    """Surveys collect garbage around every cell, which takes long among a whole session's objects:
    let it be looked for among new ones."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def survey(tiny: TinyJobs) -> tuple[JobSpec, SurveyResult]:
    """A survey that is made once; its directory is only read."""
    spec = _spec(tiny, tiny.root / "survey")
    return spec, run_survey(spec)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often workers searched values or took gradients."""
    seen: Counter[str] = Counter()
    for name in ("values", "gradients"):
        original = getattr(EditWorker, name)

        def counted(
            self: EditWorker, *args: Any, _name: str = name, _call: Any = original, **kwargs: Any
        ) -> Any:
            seen[_name] += 1
            return _call(self, *args, **kwargs)

        monkeypatch.setattr(EditWorker, name, counted)
    return seen


# --- cells --------------------------------------------------------------------------------------


def test_every_cell_has_its_rows(survey: tuple[JobSpec, SurveyResult]) -> None:
    _, result = survey
    assert result.table.schema.equals(SURVEY, check_metadata=True) and not result.failed
    found = {(r["editor"], r["setting"], r["edits"], r["status"]) for r in _rows(result.table)}
    assert found == {
        (editor, setting, edits, status)
        for editor in ("memit", "rome", "ft-l")
        for setting, edits in (
            *(("single", 3), ("batch", 1), ("batch", 4), ("batch", 20)),
            *(("sequence", 2), ("sequence", 4), ("sequence", 20)),
        )
        for status in [
            "impossible"
            if edits == 20 or (editor == "rome" and setting != "single" and edits > 1)
            else "done"
        ]
    }
    measures = {row["measure"] for row in _rows(result.table, status="done")}
    assert measures == {*SHARES, "seconds", "wall_seconds", "memory", "failed_edits"}


def test_what_cannot_be_done_says_why(survey: tuple[JobSpec, SurveyResult]) -> None:
    _, result = survey
    (row,) = _rows(result.table, editor="rome", setting="batch", edits=4)
    assert "rome writes one edit at a time, and there are 4 requests" in row["reason"]
    (row,) = _rows(result.table, editor="memit", setting="sequence", edits=20)
    assert row["reason"] == "the data set has 9 requests that can be edited"
    (row,) = _rows(result.table, editor="memit", setting="single", measure="portability")
    assert (row["value"], row["count"], row["reason"]) == (None, 0, "no probes")


def test_a_share_is_the_mean_over_edits_with_its_interval(
    survey: tuple[JobSpec, SurveyResult],
) -> None:
    spec, result = survey
    cell = {"editor": "memit", "setting": "batch", "edits": 4}
    (row,) = _rows(result.table, **cell, measure="locality")
    metrics = read(spec.run_path / row["run"]).metrics().to_pylist()
    of_edit: dict[str, list[bool]] = {}
    for probe in metrics:
        if probe["probe"] == "neighborhood":
            of_edit.setdefault(probe["case_id"], []).append(probe["unchanged"])
    means = np.array([np.mean(of_edit[case]) for case in sorted(of_edit)])
    low, high = interval(means)
    assert row["count"] == 4 == len(means)
    assert row["value"] == pytest.approx(100 * means.mean())
    assert (row["low"], row["high"]) == pytest.approx((100 * low, 100 * high))
    exact = [probe["exact"] for probe in metrics if probe["probe"] == "rewrite"]
    assert _value(result.table, **cell, measure="reliability") == pytest.approx(
        100 * np.mean(exact)
    )


def test_a_sequence_is_scored_on_all_edits_so_far(survey: tuple[JobSpec, SurveyResult]) -> None:
    _, result = survey
    counts = {
        row["edits"]: row["count"]
        for row in _rows(
            result.table, editor="ft-l", setting="sequence", measure="reliability", status="done"
        )
    }
    assert counts == {2: 2, 4: 4}
    run = read(_spec_of(result, "memit/sequence"))
    assert sorted(set(run.metrics()["round"].to_pylist())) == [0, 1]


def _spec_of(result: SurveyResult, name: str) -> str:
    return next(run for run in result.runs if run.endswith(name))


def test_what_an_edit_takes_is_counted(survey: tuple[JobSpec, SurveyResult]) -> None:
    _, result = survey
    for setting, edits in (("single", 3), ("batch", 4), ("sequence", 4)):
        cell = {"editor": "memit", "setting": setting, "edits": edits}
        seconds = _value(result.table, **cell, measure="seconds")
        wall = _value(result.table, **cell, measure="wall_seconds")
        # One worker, whose reducer works in its turn: the wall holds all of it.
        assert 0 < seconds <= wall
        assert _value(result.table, **cell, measure="memory") >= 0


def test_a_reducer_that_was_never_called_hides_no_peak() -> None:
    """Where rounds are rolled back, the lanes' reducers work and the study's own does not."""
    idle = {"seconds": 0.0, "resident": None, "device": 0}
    busy = {"seconds": 3.0, "resident": 40, "device": 2}
    manifest = {
        "peak_worker_memory_bytes": [{"editing": {**busy, "resident": 100}}, {"editing": busy}],
        "reducers_used": [busy, idle],
    }
    rows = {row["measure"]: row for row in cost_rows(manifest, {"values": 4.0, "start": 9.0}, 2)}
    found = {name: row["value"] for name, row in rows.items()}
    assert found == {"seconds": 4.5, "wall_seconds": 2.0, "memory": 100 + 40 + 2 + 2}


def test_a_cell_is_the_study_that_it_is_alone(
    survey: tuple[JobSpec, SurveyResult], tmp_path: Path
) -> None:
    _, result = survey
    run = read(_spec_of(result, "memit/sequence"))
    alone = parse_spec(run.manifest["spec"], "the cell").at(tmp_path / "alone")
    assert repr(digests(read(run_sequential(alone).path))) == repr(digests(run))


@pytest.mark.usefixtures("local_ray")
def test_on_ray_the_shares_are_the_same(
    tiny: TinyJobs, survey: tuple[JobSpec, SurveyResult], tmp_path: Path
) -> None:
    on_ray = ("cluster.engine=ray", "cluster.workers=2")
    result = run_survey(_spec(tiny, tmp_path / "ray", EDITORS, *SIZES, *on_ray))
    both = [
        [row for row in table.to_pylist() if row["measure"] in (None, *SHARES)]
        for table in (result.table, survey[1].table)
    ]
    assert both[0] == both[1]
    seconds = _rows(result.table, editor="memit", setting="single", measure="seconds")
    assert seconds[0]["value"] > 0


def test_editors_of_other_kinds_on_several_models_and_data_sets(
    tiny: TinyJobs, tmp_path: Path
) -> None:
    """One that looks for neurons, and two that put some beside the network."""
    editors = [yaml.safe_load(tiny.method(name)[0].partition("=")[2]) for name in ADDERS]
    models = [{"model": {"path": str(tiny.model(family))}} for family in ("gpt2", "llama")]
    others = str(tiny.requests(records(14)[9:]))
    datasets = [{}, {"label": "others", "requests": {"path": others}}]
    settings = tiny.settings(tmp_path / "survey", requests=NINE)
    settings |= {"method": {}, "evaluation": {"probes": ["rewrite"]}}
    settings["survey"] = {
        "editors": editors,
        "models": models,
        "datasets": datasets,
        "single": None,
        "batch": {"sizes": [2]},
        "sequence": None,
    }
    result = run_survey(parse_spec(settings, "the survey"))
    assert not result.failed
    rows = _rows(result.table, measure="reliability", status="done")
    found = [(row["model"], row["dataset"], row["editor"], row["count"]) for row in rows]
    names = ("gpt2", "llama"), (rows[0]["dataset"], "others"), ADDERS, (2,)
    assert found == list(product(*names)) and rows[0]["dataset"] != "others"
    for of_model, of_data, editor, _ in found:
        where = f"{of_model}/{of_data}/{editor}/batch-2"
        run = read(_spec_of(result, where))
        table = run.neurons() if editor == "kn" else run.training()
        table = run.patches() if editor == "t_patcher" else table
        assert table.num_rows > 0 and run.edits().num_rows == 2


# --- going on -----------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(
    tiny: TinyJobs, tmp_path: Path, searched: Counter[str]
) -> None:
    changes = ("survey.editors=[{}, {name: ft}]", "survey.batch.sizes=[4]")
    changes += ("survey.single=null", "survey.sequence=null")
    spec = _spec(tiny, tmp_path / "survey", *changes)
    first = run_survey(spec)
    whole = dict(searched)
    searched.clear()
    assert run_survey(spec).table.equals(first.table) and not searched
    table = pq.read_table(spec.run_path / "survey.parquet")
    assert table.equals(first.table)
    (Path(_spec_of(first, "memit/batch-4")) / "summary.json").unlink()
    for part in (Path(_spec_of(first, "memit/batch-4")) / "values").iterdir():
        part.unlink()
    again = run_survey(spec)
    assert searched == {"values": whole["values"]}
    (row,) = _rows(again.table, editor="memit", measure="seconds")
    assert (row["value"], row["reason"]) == (None, "the run was interrupted")


def test_a_cell_that_fails_leaves_the_others_going(
    tiny: TinyJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below every eigenvalue there is no direction to edit."""
    editors = "survey.editors=[{name: alphaedit, alphaedit: {threshold: 1.e-30}}, {}]"
    changes = (editors, "survey.single=null", "survey.sequence=null", "survey.batch.sizes=[2]")
    settings = tiny.settings(tmp_path / "survey", requests=NINE)
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(changed(settings, *changes)), encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["survey", str(path)])
    assert left.value.code == 1
    said = capsys.readouterr()
    assert "alphaedit/batch-2 failed: layer 0" in said.err and "per cent" in said.out
    table = pq.read_table(tmp_path / "survey" / "survey.parquet")
    assert [row["status"] for row in _rows(table, editor="alphaedit")] == ["failed"]
    assert {row["status"] for row in _rows(table, editor="memit")} == {"done"}
    page = (tmp_path / "survey" / "report.html").read_text(encoding="utf-8")
    assert "leaves an update no direction" in page or "layer 0" in page
    assert (tmp_path / "survey" / "report" / "survey-0-batch.png").stat().st_size > 1000


def test_a_sequence_that_fails_keeps_what_it_had_reached(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_keys = EditWorker.read_keys

    def ruined(self: EditWorker, *args: Any, version: int) -> Any:
        if version >= 4:
            raise DivergedError("layer 0: the keys hold NaNs")
        return read_keys(self, *args, version=version)

    monkeypatch.setattr(EditWorker, "read_keys", ruined)
    changes = ("survey.editors=[{}]", "survey.single=null", "survey.batch=null")
    sizes = "survey.sequence={sizes: [2, 4, 6], rounds_of: 2}"
    result = run_survey(_spec(tiny, tmp_path / "survey", *changes, sizes))
    reliable = _rows(result.table, measure="reliability")
    assert [(row["edits"], row["status"], row["count"]) for row in reliable] == [
        (2, "done", 2),
        (4, "done", 4),
    ]
    (row,) = _rows(result.table, edits=6)
    assert (row["status"], row["measure"]) == ("failed", None) and "hold NaNs" in row["reason"]
    assert list(result.failed) == [row["run"]]


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["survey.editors=[{name: memmit}]"], r"survey.editors\[0\]: method.name: .*memmit"),
        (["survey.editors=[{}, {}]"], "survey.editors: several are called 'memit'"),
        (["survey.editors=[{}]", "survey.models=[{cluster: {}}]"], "cluster is the same for all"),
        (["survey.editors=[{}]", "survey.models=[{label: a/b}]"], r"models\[0\].label: name"),
        (["survey.editors=[{}]", "survey.datasets=[{request: {}}]"], "request: unknown setting"),
        (["survey.editors=[{}]", "survey.batch.sizes=[10, 1]"], "sizes must ascend"),
        (
            ["survey.editors=[{}]", "survey.sequence={sizes: [1, 10], rounds_of: 10}"],
            "1 edits are never reached in rounds_of 10",
        ),
        (["survey={editors: [{}], single: null, batch: null, sequence: null}"], "nothing is asked"),
        (["seed=1"], "give survey.editors"),
        (["survey.editors=[{}]", "requests.path=nowhere.json"], "not one cell can be made; .*now"),
    ],
)
def test_a_wrong_survey_gets_one_line(
    tiny: TinyJobs, tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run_survey(_spec(tiny, tmp_path / "survey", *changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "survey").exists()


def test_other_commands_refuse_a_survey(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run it with `editfleet survey`"):
        run_sequential(_spec(tiny, tmp_path / "survey"))


def test_entries_change_groups_of_the_spec(tiny: TinyJobs, tmp_path: Path) -> None:
    changes = (
        "survey.models=[{label: a}, {label: b, method: {covariance_weight: 7}}]",
        "survey.datasets=[{}, {label: other, requests: {offset: 4}}]",
        "survey.editors=[{value: {steps: 2}}, {name: emmet, wrappers: [rect]}]",
        "survey.batch=null",
        "rounds={order: shuffled, past_sample: 2}",
    )
    cells = survey_cells(_spec(tiny, tmp_path / "survey", *changes))
    assert len(cells) == len({cell.spec.place for cell in cells}) == 2 * 2 * 2 * 2
    last = cells[-1]
    assert last.label == "b/other/emmet-rect/sequence"
    assert last.spec.method.covariance_weight == 7 and last.spec.requests.offset == 4
    assert last.spec.rounds is not None and last.spec.rounds.past_sample == 2
    first = cells[0].spec
    assert first.method.value.steps == 2 and first.method.value.learning_rate == 0.5
    assert first.rounds is not None and first.rounds.rollback
    assert first.rounds.order == "shuffled" and first.rounds.past_sample is None
