"""The estimate before a run: what is counted, what is printed, and what its report makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import load_spec, run_batch_edit
from pipeline.cli import main
from pipeline.cluster.comparison import run_comparison
from pipeline.cluster.plan import make_plan
from pipeline.cluster.survey import plan_survey
from pipeline.errors import InputError, ResultsDamagedError
from pipeline.evaluation.probes import Probe
from pipeline.models.editable import EditableModel
from pipeline.planning.edit_memory import EditMemorySize
from pipeline.planning.efficiency import CALL_SECONDS
from pipeline.planning.estimate import make_estimate, make_estimates
from pipeline.planning.flops import ModelSize, scoring_flops
from pipeline.planning.job import estimated
from pipeline.planning.memory import side_by_side
from pipeline.planning.outline import outline
from pipeline.planning.rates import crossing_seconds, rate_as_busy
from pipeline.report.page import write_report
from pipeline.report.plan import comparison_seconds
from pipeline.report.survey_plan import own_seconds, shared_seconds
from pipeline.results.planned import Estimate, read_estimate, write_estimate
from pipeline.spec import ModelSpec
from pipeline.spec.cells import survey_cells
from pipeline.spec.trained import SeracSpec
from tests import encoder_decoders
from tests.tiny_jobs import TinyJobs, records

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_outline_has_the_shapes_of_the_loaded_model(family: str, tiny: TinyJobs) -> None:
    found = outline(ModelSpec(path=str(tiny.model(family)), dtype="bfloat16"), device=CPU)
    loaded = AutoModelForCausalLM.from_pretrained(tiny.model(family))
    assert found.num_parameters == sum(weight.numel() for weight in loaded.parameters())
    assert ModelSize.of(found) == ModelSize.of(EditableModel(loaded))
    assert found.dtype == torch.bfloat16 and found.input_device.type == "meta"


def test_what_an_estimate_follows(tiny: TinyJobs, tmp_path: Path) -> None:
    plan = make_plan(tiny.spec(tmp_path / "run"))
    slow = make_estimate(plan, rate=1e6, steps=5, workers=(1, 2, 8))
    fast = make_estimate(plan, rate=1e8, steps=5, workers=(1,))
    longer = make_estimate(plan, rate=1e6, steps=10, workers=(1,))
    calls = 4 * CALL_SECONDS["in_process"]  # four shards
    assert slow.seconds[1]["values"] - calls == pytest.approx(
        100 * (fast.seconds[1]["values"] - calls)
    )
    assert 1.5 < longer.seconds[1]["values"] / slow.seconds[1]["values"] < 2
    # Four shards of three: two workers take two each, eight no less than one each.
    assert slow.seconds[2]["values"] == pytest.approx(slow.seconds[1]["values"] / 2)
    assert slow.seconds[8]["values"] == pytest.approx(slow.seconds[1]["values"] / 4)
    assert slow.rate_source == "given" and "covariance" in slow.seconds[1]
    # Twelve edits, two layers: residuals out, keys and residuals in.
    model = outline(plan.spec.model, device=CPU)
    d, f = model.hidden_size, model.key_size(0)
    assert slow.moved.keys == 2 * 12 * (d + f + d) * 4
    kept = tiny.finished().manifest["bytes"]
    for kind in ("update", "values", "metrics", "edits"):
        # Files of a few kilobytes are headers for the most part.
        assert slow.stored[kind] < kept[kind] < slow.stored[kind] + 40_000
    assert rate_as_busy(CPU, torch.float32, 0.01) > 1e6
    assert crossing_seconds(8.0, 2.0, 8, 1.0) == 8 + 3 * 2
    assert crossing_seconds(8.0, 2.0, 1, 1.0) == 0


def test_the_command_and_the_report_of_a_planned_run(
    tiny: TinyJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [*records(5), records(1)[0]]
    settings = tiny.settings(tmp_path / "run", requests=some)
    spec = tiny.spec_file(tmp_path / "spec.yaml", settings)

    def plan(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(spec), "--gflops", "1", *more])
        captured = capsys.readouterr()
        return int(str(ended.value.code or 0)), captured.out, captured.err

    code, out, err = plan("--worker-memory", "0.3")
    assert code == 1 and "larger than a worker's memory" in err and "300 MB" in err
    assert "1 GFLOP/s" in out and "given" in out and "insertion" in out and "reducer" in out
    assert not (tmp_path / "run").exists()
    code, out, _ = plan("--worker-memory", "2", "--save")
    assert code == 0 and "requests: 6 read:" in out and "plan.json" in out

    run = run_batch_edit(tiny.spec(tmp_path / "run", requests=some)).path
    found = read_estimate(run)
    assert found is not None and found.rate == 1e9
    page = write_report([run]).read_text()
    assert "Plan and reality" in page and "memory of a worker" in page
    with pytest.raises(InputError, match="holds a run already"):
        write_estimate(run, found)
    (run / "plan.json").write_text("{}")
    with pytest.raises(ResultsDamagedError, match=r"plan\.json: rate: Field required"):
        read_estimate(run)


def test_studies_are_planned_one_by_one_and_added_up(
    tiny: TinyJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny.settings(tmp_path / "run", requests=records(6))
    settings |= {"rounds": {"size": 3, "count": 2, "evaluate_after": [1]}}
    settings["compare"] = {"methods": [{}, {"name": "emmet", "label": "E"}], "seeds": [1, 2]}
    spec = tiny.spec_file(tmp_path / "spec.yaml", settings)
    labels = [f"{name}-seed{seed}" for name in ("memit", "E") for seed in (1, 2)]
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(spec), "--worker-memory", "2", "--save"])
    out = capsys.readouterr().out
    assert ended.value.code in (None, 0) and "all studies side by side, at most" in out
    assert [label for label in labels if f"study {label}" in out] == labels

    found = {label: read_estimate(tmp_path / "run" / label) for label in labels}
    rates = {estimate.rate for estimate in found.values() if estimate is not None}
    assert len(rates) == 1, "the rate is measured once"
    # The table's last row: what is shared once, all else of every study.
    estimates = [estimate for estimate in found.values() if estimate is not None]
    table = comparison_seconds(dict(zip(labels, estimates, strict=True)))
    shared = ("start", "covariance", "baseline")
    alone = [estimate.seconds[1] for estimate in estimates]
    expected = sum(s for seconds in alone for phase, s in seconds.items() if phase not in shared)
    expected += sum(max(seconds.get(phase, 0.0) for seconds in alone) for phase in shared)
    column = list(table.columns[1 + list(estimates[0].seconds).index(1)].cells)
    assert float(str(column[-1]).replace(",", "")) == pytest.approx(expected, abs=0.06)

    memory = side_by_side([estimate.memory for estimate in estimates])
    edited = "copies of edited weights"
    assert memory.worker[edited] == 4 * estimates[0].memory.worker[edited]
    assert memory.worker["weights"] == estimates[0].memory.worker["weights"]
    runs = run_comparison(load_spec(spec))
    assert [run.path.name for run in runs] == labels, "a planned study begins in its directory"


def test_looking_for_neurons_is_planned_by_its_steps(tiny: TinyJobs, tmp_path: Path) -> None:
    def found(steps: int) -> Estimate:
        changes = ("method.name=kn", "method.layers=null", f"method.kn.steps={steps}")
        return make_estimate(make_plan(tiny.spec(tmp_path, *changes)), rate=1e7, workers=(1,))

    once, often = found(10), found(100)
    assert set(often.seconds[1]) == {"start", "baseline", "attribution", "insertion", "evaluation"}
    assert 6 < often.seconds[1]["attribution"] / once.seconds[1]["attribution"] < 10
    assert set(often.stored) == {"edits", "metrics", "attributions", "update"}
    assert once.moved == often.moved and once.moved.keys == 0


def test_a_gradient_method_is_planned_by_its_epochs(tiny: TinyJobs, tmp_path: Path) -> None:
    def found(epochs: int) -> Estimate:
        changes = ("method.name=ft", f"method.ft={{epochs: {epochs}, batch_size: 5}}")
        return make_estimate(make_plan(tiny.spec(tmp_path, *changes)), rate=1e9, workers=(1,))

    once, often = found(1), found(10)
    assert set(often.seconds[1]) == {"start", "baseline", "training", "evaluation"}
    # Three steps of five edits at most, each a call.
    assert often.seconds[1]["training"] == pytest.approx(10 * once.seconds[1]["training"], rel=0.2)
    assert often.moved.updates == 10 * once.moved.updates and often.moved.values == 0
    assert once.stored == often.stored and "values" not in once.stored


def test_patches_are_planned_by_their_steps_and_queries(tiny: TinyJobs, tmp_path: Path) -> None:
    def found(*changes: str) -> Estimate:
        method = "method={name: t_patcher}"
        spec = tiny.spec(tmp_path, method, *changes)
        return make_estimate(make_plan(spec), rate=1e9, workers=(1,))

    once = found()
    assert set(once.seconds[1]) == {"start", "memory", "baseline", "training", "evaluation"}
    longer = found("method.t_patcher={least_steps: 975, check_every: 25}")
    assert longer.seconds[1]["training"] > 5 * once.seconds[1]["training"]
    bare = found("method.t_patcher={memory_queries: 0, watched_queries: 0}")
    assert bare.seconds[1]["training"] < 0.5 * once.seconds[1]["training"]
    assert once.memory.worker["remembered queries"] == 44_000 * 32 * 4
    assert once.stored["update"] == once.stored["piece"] > 0 == once.moved.values


def test_a_survey_is_planned_cell_by_cell(
    tiny: TinyJobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny.settings(tmp_path / "run", requests=records(9))
    settings["survey"] = {
        "editors": [{}, {"name": "rome", "layers": [1]}],
        "single": {"facts": 4},
        "batch": {"sizes": [1, 6, 20]},
        "sequence": {"sizes": [2, 6], "rounds_of": 2},
    }
    path = tiny.spec_file(tmp_path / "spec.yaml", settings)
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(path), "--gflops", "1e-3", "--worker-memory", "2", "--save"])
    out = capsys.readouterr().out
    assert ended.value.code in (None, 0)
    spec = load_spec(path)
    entries = plan_survey(survey_cells(spec))
    estimates = make_estimates(
        [entry.plan for entry in entries if entry.plan is not None], rate=1e6, workers=(1, 2)
    )
    cells = estimated(entries, estimates)
    done = {entry.cell.label: estimate for entry, estimate in cells if estimate is not None}
    assert [label.split("/", 2)[2] for label in done] == [
        "memit/single", "memit/batch-1", "memit/batch-6", "memit/sequence",
        "rome/single", "rome/batch-1",
    ]  # fmt: skip
    # A cell's estimate is that of the study that it is.
    (single,) = [e for e in entries if e.cell.label.endswith("memit/single")]
    assert single.plan is not None
    alone = make_estimate(single.plan, rate=1e6, workers=(1, 2))
    assert done[single.cell.label].seconds == alone.seconds
    assert done[single.cell.label].seconds[2]["values"] == pytest.approx(
        alone.seconds[1]["values"] / 2
    )
    kept = read_estimate(Path(single.plan.spec.place))
    assert kept is not None and kept.seconds[1] == alone.seconds[1]
    # What cannot be made says why; all is the cells' sum and what they share, once.
    for what in ("rome writes one edit at a time", "memit, batch 20: the data set has 9 requests"):
        assert what in " ".join(out.split())
    total = shared_seconds(cells, 1)["start"] + shared_seconds(cells, 1)["covariance"]
    total += sum(own_seconds(estimate, 1) for estimate in estimates)
    assert shared_seconds(cells, 1)["start"] == max(e.seconds[1]["start"] for e in estimates)
    row = next(line for line in out.splitlines()[::-1] if "all" in line and "│" in line)
    assert float(row.split("│")[2].replace(",", "")) == pytest.approx(total, rel=0.01)


def test_a_memory_beside_a_t5_counts_both_its_halves(tmp_path: Path) -> None:
    def matrices(modules: Any) -> int:
        return sum(weight.numel() for weight in modules.parameters() if weight.ndim >= 2)

    encoder_decoders.save("t5", tmp_path)
    model = outline(ModelSpec(path=str(tmp_path)), device=torch.device("cpu"))
    whole = encoder_decoders.build("t5")
    edits = encoder_decoders.prompts(encoder_decoders.case("t5"))
    size = EditMemorySize.of(SeracSpec(counterfactual_blocks=2), model, edits)
    read, says = matrices(whole.encoder.block[:2]), matrices(whole.decoder.block[:2])
    assert size.classifier == read
    assert sum(size.answering.blocks) + size.answering.source == read + says
    named = EditMemorySize.of(SeracSpec(classifier=str(tmp_path)), model, edits)
    assert (named.classifier, named.embedding) == (matrices(whole.encoder.block), 32)
    probe = Probe("a", "rewrite", 0, "The mother tongue of Anselm is", "English", "Danish")
    words = encoder_decoders.tokenizer()
    prompt = len(words(probe.prompt)["input_ids"])
    answers = 2 * size.target_tokens
    of_h = scoring_flops(size.answering, answers, answers, prompt + size.edit_tokens)
    assert size.lookup_flops([probe], words) == pytest.approx(2 * read * prompt + of_h)
