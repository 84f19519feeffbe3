"""Training editors as whole jobs, and editing with what they leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from safetensors.torch import load_file, save_file

from pipeline import run_batch_edit, run_sequential, run_survey, run_training
from pipeline.cluster.engine import Call, InProcessEngine, WorkerLostError
from pipeline.cluster.run import RunResult
from pipeline.errors import FingerprintMismatchError, InputError, ResultsDamagedError
from pipeline.report.page import write_report
from pipeline.report.status import run_status
from pipeline.results import Run, read
from pipeline.spec import JobSpec, load_spec, parse_spec
from tests.tiny_jobs import TRAININGS, TinyJobs, digests, stopped_after


def _bits(run: Run) -> dict[str, Any]:
    training = run.training().drop_columns(["seconds"])
    checkpoints = [path.read_bytes() for path in run.files("checkpoint")]
    editor = (run.path / "editor" / "editor.safetensors").read_bytes()
    return {"rows": training.to_pylist(), "checkpoints": checkpoints, "editor": editor}


@pytest.fixture(scope="module")
def trained(tiny: TinyJobs) -> dict[str, Run]:
    """A finished training of each method; only read them."""
    return {name: tiny.trained(name) for name in TRAININGS}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_leaves_rows_a_checkpoint_and_an_editor(
    trained: dict[str, Run], name: str
) -> None:
    run = trained[name]
    rows = run.training()
    steps = rows.filter(pc.equal(rows["split"], "train"))
    assert steps["step"].to_pylist() == list(range(6)) and len(run.files("checkpoint")) == 1
    measured = rows.filter(pc.equal(rows["split"], "validation"))
    assert measured["step"].to_pylist() == ([] if name == "malmen" else [1, 3, 5])
    assert all(0 <= share <= 1 for share in measured["success"].to_pylist())
    assert run.summary["requests"] == {
        "trained": 20, "validation": 2, "rejected": 0, "conflict": 0, "failed": 0,
    }  # fmt: skip
    card = json.loads((run.path / "editor" / "editor.json").read_text())
    assert card["kind"] == name and card["layers"] == [0, 1] and card["steps"] == 6
    assert card["fingerprint"] == run.manifest["model"]["fingerprint"]
    status = run_status(run.path)
    assert status.state == "finished" and [phase.left for phase in status.phases] == [0]
    run.verify()


def test_the_best_measurement_is_what_is_saved(trained: dict[str, Run]) -> None:
    rows = trained["mend"].training().to_pylist()
    losses = {row["step"]: row["loss"] for row in rows if row["split"] == "validation"}
    best = trained["mend"].summary["training"]["validation"]
    assert best["loss"] == min(losses.values()) == losses[best["step"]]
    last = load_file(trained["mend"].files("checkpoint")[0])
    saved = load_file(trained["mend"].path / "editor" / "editor.safetensors")
    for name, tensor in saved.items():
        assert tensor.equal(last[f"best.{name}"])


class Stopped(Exception):
    """Ends a job where a test wants it to."""


@pytest.mark.parametrize("name", TRAININGS)
def test_stopped_anywhere_a_training_ends_with_the_same_bits(
    tiny: TinyJobs,
    trained: dict[str, Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    submit, spec = InProcessEngine.submit, tiny.training(tmp_path / "run", name)
    for calls in (1, 7):
        left = [calls]

        def counted(
            self: Any, worker: int, method: str, *a: Any, left: Any = left, **k: Any
        ) -> Call:
            left[0] -= method == "contribute"
            if left[0] < 0:
                raise Stopped
            return submit(self, worker, method, *a, **k)

        with monkeypatch.context() as patch:
            patch.setattr(InProcessEngine, "submit", counted)
            with pytest.raises(Stopped):
                run_training(spec)
    run_training(spec)
    assert _bits(read(tmp_path / "run")) == _bits(trained[name])


@pytest.mark.parametrize(
    "name",
    ["malmen", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mend", "ke"))],
)
def test_two_workers_give_the_bits_of_one_process(
    tiny: TinyJobs, trained: dict[str, Run], tmp_path: Path, local_ray: None, name: str
) -> None:
    cluster = "cluster={engine: ray, workers: 2, shard_size: 3, reducer_threads: 1}"
    run_training(tiny.training(tmp_path / name, name, cluster))
    assert _bits(read(tmp_path / name)) == _bits(trained[name])


def test_a_lost_reducer_goes_on_from_the_last_checkpoint(
    tiny: TinyJobs, trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduce, left = InProcessEngine.reduce, [5]

    def lost(self: Any, method: str, *arguments: Any) -> Any:
        left[0] -= method == "end_step"
        if left[0] == 0 and method == "end_step":
            raise WorkerLostError("it died")
        return reduce(self, method, *arguments)

    monkeypatch.setattr(InProcessEngine, "reduce", lost)
    run_training(tiny.training(tmp_path / "run", "mend"))
    assert left[0] < 0 and _bits(read(tmp_path / "run")) == _bits(trained["mend"])


@pytest.mark.parametrize("kind", ["training", "checkpoint", "editor"])
def test_what_is_damaged_is_made_again(
    tiny: TinyJobs, trained: dict[str, Run], tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "run"
    shutil.copytree(trained["mend"].path, path)
    if kind == "editor":
        shutil.rmtree(path / "editor")
    else:
        damaged = read(path).files(kind)[0]  # type: ignore[arg-type]
        damaged.write_bytes(damaged.read_bytes()[:-3])
    run_training(tiny.training(path, "mend"))
    assert _bits(read(path)) == _bits(trained["mend"])


def test_a_complete_training_is_left_as_it_is_and_another_one_refused(
    tiny: TinyJobs, trained: dict[str, Run]
) -> None:
    path = trained["mend"].path
    before = (path / "manifest.json").read_bytes()
    result = run_training(tiny.training(path, "mend"))
    assert result.summary == trained["mend"].summary
    with pytest.raises(InputError, match=r"train\.steps was 6 and is 7"):
        run_training(tiny.training(path, "mend", "train.steps=7"))
    assert (path / "manifest.json").read_bytes() == before


def test_training_ends_once_nothing_gets_better(tiny: TinyJobs, tmp_path: Path) -> None:
    # A rate at which nothing moves: no measurement is better than the first.
    still = ("train.learning_rate=1.0e-30", "train.patience=2", "train.steps=50")
    rate = "method.mend={rank: 4, edit_rate: 1.0e-30, edit_rate_learning_rate: 1.0e-30}"
    result = run_training(tiny.training(tmp_path / "run", "mend", *still, rate))
    assert result.summary["training"]["steps"] == 6
    assert [phase.left for phase in run_status(result.path).phases] == [0]


def _edit(tiny: TinyJobs, output: Path, editor: Path, name: str, *changes: str) -> JobSpec:
    own = (f"method.name={name}", "method.contexts=null", "method.layers=null")
    return tiny.spec(output, *own, f"method.{name}.editor={editor}", *changes)


@pytest.mark.parametrize("name", ["mend", "malmen"])
def test_a_trained_editor_edits_batches(
    tiny: TinyJobs, trained: dict[str, Run], tmp_path: Path, name: str
) -> None:
    editor = trained[name].path / "editor"
    result = run_batch_edit(_edit(tiny, tmp_path / "run", editor, name))
    assert result.counts["applied"] == 12
    run = read(result.path)
    assert len(run.updates()) == 2 and write_report([run.path]).stat().st_size > 10_000  # type: ignore[union-attr]
    spec = run.manifest["spec"]["method"]
    assert spec["layers"] == [0, 1] and spec[name]["rank"] == 4
    again = run_batch_edit(_edit(tiny, tmp_path / "again", editor, name))
    assert digests(read(again.path)) == digests(run)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_trained_editor_edits_round_after_round_and_goes_on_when_stopped(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    size = 1 if name == "ke" else 2
    rounds = f"rounds={{size: {size}, count: 2, evaluate: [current]}}"
    changes = (*tiny.method(name), rounds, "output.on_divergence=keep")

    def job(directory: str) -> RunResult:
        return run_sequential(tiny.spec(tmp_path / directory, *changes))

    result = job("whole")
    assert result.counts["applied"] == 2 * size
    whole = read(result.path)
    assert len(whole.updates()) == 4
    # Before the first round's updates are applied, and amid the second round.
    for calls in (2, 4):
        with monkeypatch.context() as patch:
            stopped_after(calls, patch)
            with pytest.raises(KeyboardInterrupt):
                job("stopped")
    again = read(job("stopped").path)
    assert len(again.manifest["resumed"]) == 2
    assert digests(again) == digests(whole)
    rows = [run.training().drop_columns(["seconds"]).to_pylist() for run in (again, whole)]
    assert rows[0] == rows[1] != []


def test_what_does_not_fit_an_editor_is_said_in_one_line(
    tiny: TinyJobs, trained: dict[str, Run], tmp_path: Path
) -> None:
    editor, run = trained["mend"].path / "editor", tmp_path / "run"
    cases = {
        r"method\.mend\.editor: mend edits with an editor that is trained first": (
            "method.name=mend",
            "method.contexts=null",
        ),
        r"method\.mend\.editor: .* is no editor: it has no editor\.json": (
            "method.name=mend",
            "method.contexts=null",
            f"method.mend.editor={tmp_path}",
        ),
    }
    for message, changes in cases.items():
        with pytest.raises(InputError, match=message):
            run_batch_edit(tiny.spec(run, *changes))
    refused = {
        r"method\.malmen\.editor: .* is an editor of mend": ("malmen", ()),
        r"method\.layers: the editor .* is for \[0, 1\], not \[1\]": (
            "mend",
            ("method.layers=[1]",),
        ),
        r"method\.mend\.rank: it is 4 in the editor": ("mend", ("method.mend.rank=8",)),
        "is another editor than that of digest 0": ("mend", ("method.mend.editor_sha256='0'",)),
        "train: the spec is that of a training": ("mend", ("train.steps=5",)),
    }
    for message, (name, more) in refused.items():
        with pytest.raises(InputError, match=message):
            run_batch_edit(_edit(tiny, run, editor, name, *more))
    with pytest.raises(InputError, match="ke writes one edit at a time, and there are 12 requests"):
        run_batch_edit(_edit(tiny, run, trained["ke"].path / "editor", "ke"))
    other = f"model.path={tiny.model('gptj')}"
    with pytest.raises(FingerprintMismatchError, match="was trained on another model"):
        run_batch_edit(_edit(tiny, run, editor, "mend", other))
    assert not run.exists()


def test_a_damaged_editor_is_refused(
    tiny: TinyJobs, trained: dict[str, Run], tmp_path: Path
) -> None:
    editor = tmp_path / "editor"
    shutil.copytree(trained["mend"].path / "editor", editor)
    weights = load_file(editor / "editor.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, editor / "editor.safetensors")
    with pytest.raises(ResultsDamagedError, match="is not the file that was trained"):
        run_batch_edit(_edit(tiny, tmp_path / "run", editor, "mend"))
    (editor / "editor.json").write_text("{}")
    with pytest.raises(ResultsDamagedError, match=r"editor\.json is damaged"):
        run_batch_edit(_edit(tiny, tmp_path / "run-2", editor, "mend"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("train.batch_size=100",), "train.batch_size: 100 edits are to be made at once"),
        (("rounds.size=2",), "rounds: a training has none"),
        (("method.name=memit",), "method.name: memit has no editor to train"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_anything_is_written(
    tiny: TinyJobs, tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_training(tiny.training(tmp_path / "run", "mend", *changes))
    assert not (tmp_path / "run").exists()


def test_training_lowers_the_loss_of_two_facts(tiny: TinyJobs, tmp_path: Path) -> None:
    spec = tiny.training(tmp_path / "run", "mend", "train.steps=30", "train.validation=0")
    limited = spec.model_copy(update={"requests": spec.requests.model_copy(update={"limit": 2})})
    rows = read(run_training(limited).path).training().to_pylist()
    for part in ("loss", "edit_loss"):
        losses = [row[part] for row in rows]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_an_editor_is_trained_on_a_zsre_file(tiny: TinyJobs, tmp_path: Path) -> None:
    """Asked by its rephrased questions, and by those of Natural Questions that come with them."""
    content = [
        {
            "subject": name,
            "src": f"Where did {name} study?",
            "rephrase": f"At what place was {name} a student?",
            "alt": "Rome",
            "answers": ["London"],
            "loc": "nq question: who plays the violin",
            "loc_ans": "Zdeněk Kováč",
        }
        for name in ("Anselm Mills", "Oduya", "Torvald", "Marguerite Port")
    ]
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    source = f"requests={{path: {path}, format: zsre}}"
    changes = (source, "train.steps=2", "train.validation=0.25")
    run = read(run_training(tiny.training(tmp_path / "run", "mend", *changes)).path)
    counts = run.summary["requests"]
    assert (counts["trained"], counts["validation"], counts["rejected"]) == (3, 1, 0)
    steps = run.training().filter(pc.equal(run.training()["split"], "train")).to_pylist()
    assert [row["step"] for row in steps] == [0, 1]
    assert all(row["edit_loss"] > 0 and row["locality_loss"] >= 0 for row in steps)
    assert (run.path / "editor" / "editor.safetensors").stat().st_size > 0


def test_a_training_has_a_report_and_commands(trained: dict[str, Run], tmp_path: Path) -> None:
    for name, run in trained.items():
        page = write_report([run.path], tmp_path / name)
        assert "Training of an editor" in page.read_text()  # type: ignore[union-attr]


SPECS = Path(__file__).parents[2] / "jobs" / "specs"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "setting", "reliability", "locality"),
    [("mend", "single", 95.0, 30.0), ("malmen", "batch", 95.0, 50.0), ("ke", "single", 95.0, 15.0)],
)
def test_editors_of_the_embedded_world_write_twenty_facts_they_have_not_seen(
    tmp_path: Path, name: str, setting: str, reliability: float, locality: float
) -> None:
    """As the specs train them, and as a survey edits; malmen writes the twenty at once."""
    cluster = {"engine": "in_process", "reducer_threads": 1}
    changes = ["cluster.engine=in_process", f"output.path={tmp_path / 'train'}"]
    run = read(run_training(load_spec(SPECS / f"train_{name}_factworld.yaml", changes)).path)
    print(run.summary["training"]["validation"])
    editor = {"name": name, "contexts": ["{}"], name: {"editor": str(run.path / "editor")}}
    content: dict[str, Any] = {
        "requests": {"limit": 600},
        "survey": {
            "editors": [editor],
            "single": {"facts": 20},
            "batch": {"sizes": [20]},
            "sequence": None,
        },
        "cluster": cluster,
        "output": {"path": str(tmp_path / "survey")},
    }
    rows = run_survey(parse_spec(content, "the test")).table.to_pylist()
    for row in rows:
        print(row["setting"], row["status"], row["measure"], row["value"])
    found = {row["measure"]: row["value"] for row in rows if row["setting"] == setting}
    assert found["reliability"] >= reliability and found["locality"] >= locality
