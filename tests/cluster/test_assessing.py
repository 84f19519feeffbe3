"""Assessing facts: probabilities against plain passes, ratios, whole jobs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.cluster.assessing import run_assess
from pipeline.cluster.engine import Call, InProcessEngine
from pipeline.errors import InputError
from pipeline.evaluation.knowledge import Assessed, assess, draw_contrasts
from pipeline.report.page import write_report
from pipeline.requests import EditRequest
from pipeline.results import Run, read
from pipeline.spec import JobSpec
from tests import encoder_decoders
from tests.cases import EDITS, case
from tests.tiny_jobs import TinyJobs, records

FAMILY_NAMES = ["gpt2", "gptj", "llama", "qwen2", "gemma2", "gpt_neox"]


@torch.no_grad()
def _plain(family: str, prompt: str, wanted: str, tokens: int | None) -> float:
    """P(object | prompt) from one whole pass, token by token."""
    tiny = case(family)
    before = tiny.tokenizer(prompt)["input_ids"]
    target = tiny.tokenizer(f" {wanted}", add_special_tokens=False)["input_ids"][:tokens]
    logits = tiny.model(input_ids=torch.tensor([[*before, *target]])).logits[0].double()
    probability = 1.0
    for place, token in enumerate(target):
        probability *= float(logits[len(before) - 1 + place].softmax(-1)[token])
    return probability


@pytest.mark.parametrize("read_", ["object", "first_token"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_probabilities_are_those_of_plain_passes(family: str, read_: Any) -> None:
    tiny = case(family)
    prompts = [
        (edit.prompt.replace("{}", edit.subject), f"{edit.subject} is in", f"Is {edit.subject} the")
        for edit in EDITS[:3]
    ]
    objects = [edit.target_new for edit in EDITS[:3]]
    found = assess(tiny.editable, tiny.tokenizer, prompts, objects, read_, 256)
    tokens = 1 if read_ == "first_token" else None
    for one, texts, wanted in zip(found, prompts, objects, strict=True):
        own, *others = (_plain(family, text, wanted, tokens) for text in texts)
        assert one.probability == pytest.approx(own, rel=1e-4)
        assert one.contrastive == pytest.approx(others, rel=1e-4)


@pytest.mark.parametrize("read_", ["object", "first_token"])
@pytest.mark.parametrize("kind", encoder_decoders.KINDS)
def test_a_decoders_probabilities_are_those_of_its_whole_answer(kind: str, read_: Any) -> None:
    model, words = encoder_decoders.case(kind), encoder_decoders.tokenizer()
    texts = ("The mother tongue of Oduya is", "Oduya is in the")
    (found,) = assess(model, words, [texts], ["Port Velmora"], read_, 256)
    labels = words("Port Velmora", return_tensors="pt")["input_ids"]
    expected = []
    for text in texts:
        asked = words(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likely = model.model(input_ids=asked, labels=labels).logits[0].log_softmax(-1)
        of_tokens = likely.gather(1, labels[0][:, None])[:, 0].exp()
        expected.append(float(of_tokens.prod() if read_ == "object" else of_tokens[0]))
    assert [found.probability, *found.contrastive] == pytest.approx(expected, rel=1e-6)


def test_the_ratio_and_its_smoothing() -> None:
    found = Assessed(0.2, (0.1, 0.3, 0.2))
    assert found.score(0.0) == pytest.approx(1.0)
    assert found.score(1.0) == pytest.approx(1.0)
    assert Assessed(0.3, (0.1,)).score(0.1) == pytest.approx(2.0)
    assert Assessed(1e-9, (1e-12,)).score(0.0) == pytest.approx(1000)
    # What is unlikely behind every prompt is not held once the ratio is smoothed.
    assert Assessed(1e-9, (1e-12,)).score(1e-4) == pytest.approx(1.0, abs=1e-4)
    assert Assessed(0.0, (0.0,)).score(0.0) is None
    assert Assessed(0.5, (0.0,)).score(0.0) == float("inf")


def _facts() -> list[EditRequest]:
    prompts = {"P0": "The mother tongue of {} is", "P1": "{} plays the", "P2": "{} is in"}
    return [
        EditRequest(
            case_id=f"{name}-{subject}",
            subject=subject,
            prompt=prompt,
            target_new="x",
            relation_id=name,
        )
        for name, prompt in prompts.items()
        for subject in ("Rome", "Oduya")
    ]


def test_contrasts_are_of_other_relations_and_follow_from_the_seed() -> None:
    facts = _facts()
    found = draw_contrasts(facts, 2, 0)
    assert set(found["P0-Rome"]) == {"Rome plays the", "Rome is in"}
    assert set(found["P2-Oduya"]) == {"The mother tongue of Oduya is", "Oduya plays the"}
    assert draw_contrasts(facts[::-1], 2, 0) == found
    assert (
        draw_contrasts(facts, 9, 0)["P1-Rome"] and len(draw_contrasts(facts, 1, 0)["P1-Rome"]) == 1
    )
    assert draw_contrasts(facts[:2], 3, 0) == {"P0-Rome": (), "P0-Oduya": ()}


# --- whole jobs ---------------------------------------------------------------------------------


def _spec(tiny: TinyJobs, output: Path, *changes: str) -> JobSpec:
    return tiny.spec(output, "assess={prompts: 2, smoothing: 0.001}", *changes)


def _rows(run: Run) -> list[dict[str, Any]]:
    return run.assessment().sort_by("case_id").to_pylist()


def test_an_assessment_finds_what_is_held(tiny: TinyJobs, tmp_path: Path) -> None:
    result = run_assess(_spec(tiny, tmp_path / "run"))
    assert result.counts["assessed"] == 12
    rows, found = _rows(read(result.path)), result.summary["assessment"]
    for row in rows:
        ratio = (row["probability"] + 0.001) / (row["contrastive"] + 0.001)
        assert row["score"] == pytest.approx(ratio) and row["is_held"] == (ratio > 1)
        assert len(row["contrasts"]) == 2 and row["round"] == -1
        assert all(row["subject"] in text != row["prompt"] for text in row["contrasts"])
    assert found["facts"] == 12 and found["held"] == sum(row["is_held"] for row in rows)
    assert sum(of["facts"] for of in found["relations"].values()) == 12
    again = run_assess(_spec(tiny, tmp_path / "run"))
    assert again.summary == result.summary
    page = Path(write_report([result.path])).read_text(encoding="utf-8")
    assert (result.path / "report" / "ratios.svg").exists() and "Facts by relation" in page
    wrong = [row for row in rows if not row["is_held"]]
    assert ("Facts that are not held" in page) == bool(wrong)
    assert all(f"<bdi>{row['case_id']}</bdi></th>" in page for row in wrong)
    with pytest.raises(InputError, match="an assessment of facts; report on it alone"):
        write_report([result.path, result.path], tmp_path / "both")
    said = CliRunner().invoke(app, ["summary", str(result.path)])
    assert said.exit_code == 0 and "facts that the model holds" in said.output


def test_it_goes_on_and_has_the_same_bits_on_ray(
    tiny: TinyJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _rows(read(run_assess(_spec(tiny, tmp_path / "whole")).path))
    cluster = "cluster={engine: ray, workers: 2, shard_size: 3, reducer_threads: 1}"
    assert _rows(read(run_assess(_spec(tiny, tmp_path / "ray", cluster)).path)) == expected
    submit, left = InProcessEngine.submit, [2]

    def counted(self: InProcessEngine, worker: int, method: str, *a: Any, **k: Any) -> Call:
        left[0] -= method == "assessment"
        if left[0] < 0:
            raise KeyError("stopped")
        return submit(self, worker, method, *a, **k)

    with monkeypatch.context() as patch:
        patch.setattr(InProcessEngine, "submit", counted)
        with pytest.raises(KeyError):
            run_assess(_spec(tiny, tmp_path / "cut"))
    assert 0 < read(tmp_path / "cut").assessment().num_rows < 12
    assert _rows(read(run_assess(_spec(tiny, tmp_path / "cut")).path)) == expected


def test_what_cannot_be_assessed_is_said(tiny: TinyJobs, tmp_path: Path) -> None:
    content = records(6)
    del content[2]["requested_rewrite"]["target_true"]
    spec = _spec(tiny, tmp_path / "some").model_copy(
        update={"requests": tiny.spec(tmp_path, requests=content).requests}
    )
    result = run_assess(spec)
    assert (result.counts["assessed"], result.counts["skipped"]) == (5, 1)
    assert "it has no target_true" in (result.path / "manifest.jsonl").read_text()
    alike = [record for record in records(40) if record["requested_rewrite"]["relation_id"] == "P0"]
    of_one = spec.model_copy(
        update={"requests": tiny.spec(tmp_path, requests=alike[:3]).requests}
    ).at(tmp_path / "none")
    with pytest.raises(InputError, match="all requests are of one relation"):
        run_assess(of_one)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="an assessment has none; set rounds to null"):
        run_assess(_spec(tiny, tmp_path / "b", "rounds={size: 2}"))
