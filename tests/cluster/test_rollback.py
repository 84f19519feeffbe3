"""Studies that put the unedited weights back after every round."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import apply_updates, export_model, run_batch_edit, run_sequential
from pipeline.cluster import run as run_module
from pipeline.cluster.engine import InProcessEngine
from pipeline.cluster.worker import EditWorker
from pipeline.errors import InputError
from pipeline.models.loading import load_model
from pipeline.results import Run, read
from pipeline.results.updates import read_update
from pipeline.spec import JobSpec, ModelSpec
from pipeline.unediting import unedit
from tests.tiny_jobs import (
    LAYERS,
    METHODS,
    TRAININGS,
    TinyJobs,
    digests,
    records,
    statuses,
)

ROUNDS = "rounds={size: 1, rollback: true, evaluate_every: 1, evaluate: [current]}"
FIVE = records(5)
ALPHAEDIT = ("method.name=alphaedit", "method.alphaedit={threshold: 0.5, threshold_is: relative}")
# Each edit searched by itself, as a batch of one is: else its last bits are its neighbours'.
ALONE = "cluster.shard_size=1"


class Studies:
    """Studies of five requests, one a round, that are run once."""

    def __init__(self, tiny: TinyJobs) -> None:
        self.tiny = tiny
        self._finished: dict[tuple[str, ...], Run] = {}

    def spec(self, output: Path, *changes: str) -> JobSpec:
        return self.tiny.spec(output, ROUNDS, *changes, requests=FIVE)

    def finished(self, *changes: str) -> Run:
        if changes not in self._finished:
            output = self.tiny.root / "apart" / str(len(self._finished))
            self._finished[changes] = read(run_sequential(self.spec(output, *changes)).path)
        return self._finished[changes]

    def batch(self, output: Path, number: int, *changes: str) -> Run:
        """The batch job of one of the requests."""
        one = (f"requests.offset={number}", "requests.limit=1")
        spec = self.tiny.spec(output, *changes, *one, requests=FIVE)
        return read(run_batch_edit(spec).path)


@pytest.fixture(scope="module")
def studies(tiny: TinyJobs) -> Studies:
    return Studies(tiny)


def _scores(run: Run, case_id: str) -> list[dict[str, Any]]:
    rows = [row for row in run.metrics().to_pylist() if row["case_id"] == case_id]
    kept = [{**row, "edit_round": 0, "round": 0} for row in rows if row["round"] >= 0]
    return sorted(kept, key=lambda row: (row["probe"], row["probe_index"]))


# --- the bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [(), ALPHAEDIT, ("method.wrappers=[blue]",), *METHODS, *TRAININGS], ids=str
)
def test_every_round_is_the_batch_of_its_own_edit(
    studies: Studies, tmp_path: Path, method: tuple[str, ...] | str
) -> None:
    """To the bit, weights and adapters, whatever the rounds before it were."""
    if isinstance(method, str):
        method = (*studies.tiny.method(method), "output.on_divergence=keep")
    changes = (*method, ALONE)
    run, batch = studies.finished(*changes), studies.batch(tmp_path, 3, *changes)
    for ours, theirs in zip(run.updates(3), batch.updates(), strict=True):
        (_, found, _), (_, expected, _) = read_update(ours), read_update(theirs)
        assert found.parts.keys() == expected.parts.keys()
        for name, part in expected.parts.items():
            assert torch.equal(found.parts[name], part)
    assert max(read_update(path)[1].norm() for path in batch.updates()) > 0
    assert _scores(run, "3") == _scores(batch, "3") != []


def test_searched_together_edits_are_the_same_to_rounding(studies: Studies, tmp_path: Path) -> None:
    together, alone = studies.finished(), studies.finished(ALONE)
    pairs = zip(together.updates(), alone.updates(), strict=True)
    matrices = [[read_update(path)[1].matrix() for path in pair] for pair in pairs]
    assert max(float((a - b).norm() / b.norm()) for a, b in matrices) < 1e-3


def test_the_unedited_weights_are_back_to_the_bit(
    studies: Studies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = []

    def start(spec: JobSpec) -> InProcessEngine:
        engines.append(InProcessEngine(spec))
        return engines[-1]

    monkeypatch.setattr(run_module, "start_engine", start)
    run_sequential(studies.spec(tmp_path / "run"))
    (engine,) = engines
    found = engine._worker.model.model.state_dict()
    fresh = load_model(ModelSpec(path=str(studies.tiny.model())), torch.device("cpu"))
    assert all(torch.equal(found[name], weight) for name, weight in fresh.state_dict().items())


def test_there_is_nothing_to_remember(studies: Studies) -> None:
    plain, remembering = studies.finished(), studies.finished("method.name=memit_accumulated")
    pairs = zip(plain.updates(), remembering.updates(), strict=True)
    assert all(torch.equal(*(read_update(p)[1].matrix() for p in pair)) for pair in pairs)
    assert not studies.finished("method.name=ultraedit").files("state")


@pytest.mark.usefixtures("local_ray")
def test_workers_make_rounds_at_the_same_time_to_the_same_bits(
    studies: Studies, tmp_path: Path
) -> None:
    on_ray = ("cluster.engine=ray", "cluster.workers=2")
    spec = studies.spec(tmp_path / "run", *on_ray)
    run = read(run_sequential(spec).path)
    assert repr(digests(run)) == repr(digests(studies.finished()))


# --- what is left -------------------------------------------------------------------------------


def test_the_summary_counts_all_edits_together(studies: Studies) -> None:
    summary = studies.finished().summary
    unedited, edited = summary["evaluation"]["rounds"]
    assert (unedited["round"], edited["round"], edited["edits"]) == (-1, 4, 5)
    assert summary["current"]["rounds"] == [edited]
    assert len(summary["rounds"]) == 5 and {"values", "insertion"} <= summary["seconds"].keys()


def test_a_round_is_exported_by_itself(studies: Studies, tmp_path: Path) -> None:
    run = studies.finished()
    fresh = load_model(ModelSpec(path=str(studies.tiny.model())), torch.device("cpu"))
    model = load_model(ModelSpec(path=str(studies.tiny.model())), torch.device("cpu"))
    apply_updates(model, run.path, round=2)
    export_model(run.path, tmp_path / "model", round=2)
    exported = load_model(ModelSpec(path=str(tmp_path / "model")), torch.device("cpu"))
    changed = {
        name
        for name, weight in exported.state_dict().items()
        if not torch.equal(weight, fresh.state_dict()[name])
    }
    assert len(changed) == len(LAYERS)
    for path in run.updates(2):
        _, update, metadata = read_update(path)
        name = metadata["weight"]
        whole = fresh.state_dict()[name] + update.matrix().T  # GPT-2 keeps (F, D)
        assert torch.equal(exported.state_dict()[name], whole)
        assert torch.equal(model.state_dict()[name], whole)


# --- going on -----------------------------------------------------------------------------------


def test_only_the_rounds_that_are_lost_are_made_again(
    studies: Studies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = studies.spec(tmp_path / "run", ALONE)
    expected = digests(read(run_sequential(spec).path))
    (spec.run_path / "updates" / "round=00001" / "layer-00000.safetensors").unlink()
    (spec.run_path / "values" / "round-00003-shard-00000.parquet").unlink()
    made: Counter[str] = Counter()
    for name in ("values", "read_keys"):
        original = getattr(EditWorker, name)

        def counted(
            self: EditWorker, *args: Any, _name: str = name, _call: Any = original, **kwargs: Any
        ) -> Any:
            made[_name] += 1
            return _call(self, *args, **kwargs)

        monkeypatch.setattr(EditWorker, name, counted)
    assert repr(digests(read(run_sequential(spec).path))) == repr(expected)
    assert made == {"values": 1, "read_keys": 2 * len(LAYERS)}


@pytest.mark.parametrize(
    "ruin", [("method.max_drift=1.e-9",), ("method.name=ft", "method.ft.learning_rate=1.e+30")]
)
def test_a_round_that_diverges_fails_alone(
    studies: Studies, tmp_path: Path, ruin: tuple[str, ...]
) -> None:
    run = read(run_sequential(studies.spec(tmp_path / "run", *ruin)).path)
    assert run.manifest["status"] == "finished"
    assert statuses(run) == {"failed": 5}
    assert all("diverged" in reason for reason in run.edits()["reason"].to_pylist())
    assert not any(read_update(path)[1].matrix().any() for path in run.updates())
    before, after = run.summary["evaluation"]["rounds"]
    assert before["ES"] == after["ES"], "the unedited model answers for them"
    assert run_sequential(studies.spec(tmp_path / "run", *ruin)).summary == run.summary


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("rounds.evaluate=[all_past]",), "rollback takes every round's edits back"),
        (("output.save_model=true",), "no model holds the edits; `editfleet export RUN DIR"),
    ],
)
def test_what_needs_all_edits_at_once_is_refused(
    studies: Studies, tmp_path: Path, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_sequential(studies.spec(tmp_path / "run", *changes))


def test_no_model_holds_all_rounds(studies: Studies, tmp_path: Path) -> None:
    run = studies.finished()
    with pytest.raises(InputError, match="say with --round"):
        export_model(run.path, tmp_path / "model")
    with pytest.raises(InputError, match="holds no whole round 5"):
        export_model(run.path, tmp_path / "model", round=5)
    with pytest.raises(InputError, match="every round was rolled back"):
        unedit(run.path, ["1"], tmp_path / "model")
