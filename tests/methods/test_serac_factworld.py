"""A SERAC editor of the embedded model: trained on some facts, it edits others."""

import json
from pathlib import Path

import pyarrow.compute as pc
import pytest
import yaml

from pipeline import factworld, load_serac, run_batch_edit, run_sequential
from pipeline.cluster.learning import run_training
from pipeline.exporting import export_model
from pipeline.results import Run, read
from pipeline.spec import JobSpec, parse_spec

SHIPPED = Path(__file__).parents[2] / "jobs" / "specs" / "train_serac_factworld.yaml"
EDITS = 20
PROBES = ["rewrite", "paraphrase", "neighborhood", "locality", "portability"]


def _exact(run: Run, probe: str) -> float:
    """Share of a probe's rows after all rounds whose answer is the argmax."""
    metrics = run.metrics()
    rows = metrics.filter(
        pc.and_(
            pc.equal(metrics["probe"], probe), pc.equal(metrics["round"], pc.max(metrics["round"]))
        )
    )
    return float(pc.mean(rows["exact"].cast("float64")).as_py())


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_it_writes_facts_that_it_was_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factworld.write_requests(tmp_path / "all.json", 400 + EDITS)
    records = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    for name, some in (("edit", records[:EDITS]), ("train", records[EDITS:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some), encoding="utf-8")

    def spec(name: str, **changes: object) -> JobSpec:
        settings = {
            "name": name,
            "cluster": {"engine": "in_process"},
            "requests": {"path": str(tmp_path / "edit.json"), "format": "counterfact"},
            "evaluation": {"probes": PROBES},
            "output": {"path": str(tmp_path / name)},
        }
        return parse_spec({**settings, **changes}, "the test")

    shipped = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    requests = {"path": str(tmp_path / "train.json"), "format": "counterfact"}
    method = {"method": shipped["method"], "train": shipped["train"]}
    run_training(spec("train", requests=requests, **method))
    own = {"editor": str(tmp_path / "train" / "editor")}
    edits = {"name": "serac", "serac": own}
    batch = read(run_batch_edit(spec("batch", method=edits)).path)
    rounds = {"size": 4, "evaluate": ["all_past", "current"]}
    study = read(run_sequential(spec("study", method=edits, rounds=rounds)).path)
    soft = {"name": "serac", "serac": {**own, "mode": "soft"}}
    mixed = read(run_batch_edit(spec("soft", method=soft)).path)
    scores = {
        name: {probe: round(_exact(run, probe), 3) for probe in PROBES}
        for name, run in (("batch", batch), ("study", study), ("soft", mixed))
    }
    with capsys.disabled():
        print("\nSERAC on the embedded model, exact:", scores)
    assert scores["batch"]["rewrite"] >= 0.95 and scores["study"]["rewrite"] >= 0.95
    # What is printed of `locality` asks for the subject's other fact, half of which are taken for
    # the edited one.
    assert scores["batch"]["neighborhood"] >= 0.95 and scores["study"]["neighborhood"] >= 0.95
    export_model(batch.path, tmp_path / "out")
    served = load_serac(tmp_path / "out")
    right = 0
    for record in records[:EDITS]:
        asked = record["requested_rewrite"]
        prompt = asked["prompt"].replace("{}", asked["subject"])
        given = served.tokenizer(prompt, return_tensors="pt")
        ids = served.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0)
        new = served.tokenizer.decode(ids[0, given["input_ids"].shape[1] :])
        right += new.strip().startswith(asked["target_new"]["str"])
    assert right >= 0.95 * EDITS
