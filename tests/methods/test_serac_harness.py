"""`editfleet harness` on a run with an edit memory: contexts are looked up, running text is not."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import export_model, load_serac, run_batch_edit
from pipeline.harness import run_harness
from pipeline.results import Run, read
from pipeline.serving import log_likelihoods, served_run
from tests.lm_eval_tasks import QUESTIONS, write_questions, write_task
from tests.methods.test_serac_jobs import serac_spec
from tests.tiny_jobs import TinyJobs


@pytest.fixture(scope="module")
def run(tiny: TinyJobs) -> Run:
    return read(run_batch_edit(serac_spec(tiny, tiny.root / "serac-harness")).path)


def test_answers_are_as_likely_as_the_run_has_them(tiny: TinyJobs, run: Run) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model())
    served, memory = served_run(run, base, tokenizer)
    rows = [row for row in run.metrics().to_pylist() if row["probe"] in ("rewrite", "neighborhood")]
    assert len(memory) == 12
    for round, size in ((0, 5), (-1, 4)):
        if round == -1:
            memory.remove([entry.key for entry in memory])
        asked = [row for row in rows if row["round"] == round]
        ids = [
            (tokenizer(row["prompt"])["input_ids"], tokenizer(f" {row['target_new']}")["input_ids"])
            for row in asked
        ]
        found = [
            score
            for start in range(0, len(ids), size)
            for score in log_likelihoods(
                served, ids[start : start + size], looked_up=True, limit=base.config.n_positions
            )
        ]
        means = [-total / len(ids[i][1]) for i, (total, _) in enumerate(found)]
        assert means == pytest.approx([row["nll_new"] for row in asked], abs=1e-4)
        # A neighbour's exact answer is the old one.
        greedy = [
            one for (_, one), row in zip(found, asked, strict=True) if row["probe"] == "rewrite"
        ]
        assert greedy == [row["exact"] for row in asked if row["probe"] == "rewrite"]


def test_running_text_is_read_by_the_edited_model(tiny: TinyJobs, run: Run) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model())
    served, _ = served_run(run, base, tokenizer)
    prompt = tokenizer(QUESTIONS[0][0])["input_ids"]
    asked = [(prompt[:3], prompt[3:]), (prompt[:5], prompt[5:])]
    ((first, _), _) = log_likelihoods(served, asked, looked_up=False, limit=1000)
    with torch.no_grad():
        scores = base(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = sum(float(scores[place - 1, prompt[place]]) for place in range(3, len(prompt)))
    assert first == pytest.approx(expected, abs=1e-4)
    # A row that is too long loses its beginning.
    ((cut, _),) = log_likelihoods(served, asked[:1], looked_up=False, limit=len(prompt) - 2)
    with torch.no_grad():
        scores = base(torch.tensor([prompt[1:-1]])).logits[0].log_softmax(-1)
    expected = sum(float(scores[place - 2, prompt[place]]) for place in range(3, len(prompt)))
    assert cut == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: editfleet[harness]")
def test_lm_eval_gives_what_a_plain_loop_does(tiny: TinyJobs, run: Run, tmp_path: Path) -> None:
    write_questions(tmp_path / "questions.jsonl")
    write_task(tmp_path, "facts", "questions.jsonl")
    [row] = run_harness(run.path, ["facts"], include_path=tmp_path, output=tmp_path / "out")
    export_model(run.path, tmp_path / "model")
    served = load_serac(tmp_path / "model")
    shares = []
    for _ in range(2):
        right = 0
        for question, options, _ in QUESTIONS:
            prompt = served.tokenizer(question)["input_ids"]
            sums = [
                log_likelihoods(
                    served,
                    [(prompt, served.tokenizer(option)["input_ids"])],
                    looked_up=True,
                    limit=1000,
                )[0][0]
                for option in options
            ]
            right += sums[1] > sums[0]
        shares.append(right / len(QUESTIONS))
        memory = served.router.memory
        memory.remove([entry.key for entry in memory])
    assert (row["edited"], row["unedited"]) == pytest.approx(tuple(shares))
    assert row["edited"] > row["unedited"]
