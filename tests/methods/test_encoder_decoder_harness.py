"""`editfleet harness` on a T5 with an edit memory: scores, answers and running text, plainly."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import export_model, load_serac, run_batch_edit
from pipeline.editing.serac.serving import SeracModel
from pipeline.harness import run_harness
from pipeline.results import Run, read
from pipeline.serving import log_likelihoods, served_run
from tests import encoder_decoders
from tests.cluster.test_encoder_decoder_editors import METHODS, Jobs
from tests.lm_eval_tasks import QUESTIONS, write_questions, write_task
from tests.tiny_jobs import TinyJobs

SOME = QUESTIONS[:6]
"""Those whose facts are edited."""
NEW = 3


@pytest.fixture(scope="module")
def run(tiny: TinyJobs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("encoder-decoder-harness")
    spec = Jobs(tiny, root).spec("serac", root / "run", "output.on_divergence=keep")
    return read(run_batch_edit(spec).path)


def _base() -> Any:
    return encoder_decoders.build(METHODS["serac"][0], torch.float32)


def _ids(text: str, **options: bool) -> list[int]:
    ids: list[int] = encoder_decoders.tokenizer()(text, **options)["input_ids"]
    return ids


def test_answers_are_as_likely_as_the_run_has_them(run: Run) -> None:
    served, memory = served_run(run, _base(), encoder_decoders.tokenizer())
    rows = [row for row in run.metrics().to_pylist() if row["probe"] in ("rewrite", "neighborhood")]
    for round, size in ((0, 5), (-1, 4)):
        if round == -1:
            memory.remove([entry.key for entry in memory])
        asked = [row for row in rows if row["round"] == round]
        ids = [(_ids(row["prompt"]), _ids(row["target_new"])) for row in asked]
        found = [
            score
            for start in range(0, len(ids), size)
            for score in log_likelihoods(
                served, ids[start : start + size], looked_up=True, limit=1000
            )
        ]
        means = [-total / len(ids[i][1]) for i, (total, _) in enumerate(found)]
        assert means == pytest.approx([row["nll_new"] for row in asked], abs=1e-4)
        # A neighbour's exact answer is the old one.
        for (_, exact), row in zip(found, asked, strict=True):
            assert row["probe"] != "rewrite" or exact == row["exact"]


@torch.no_grad()
def _likelihood(model: Any, source: list[int], answer: list[int]) -> float:
    start = model.config.decoder_start_token_id
    given = {"input_ids": [source], "decoder_input_ids": [[start, *answer[:-1]]]}
    logits: Tensor = model(**{name: torch.tensor(ids) for name, ids in given.items()}).logits
    scores = logits[0].log_softmax(-1)
    return sum(float(scores[place, token]) for place, token in enumerate(answer))


def test_running_text_is_read_by_the_edited_model(run: Run) -> None:
    base = _base()
    served, _ = served_run(run, base, encoder_decoders.tokenizer())
    source, text = _ids(SOME[0][0]), _ids(SOME[1][0])
    asked = [(source, text), (source[:2], text[:3])]
    found = log_likelihoods(served, asked, looked_up=False, limit=1000)
    expected = [_likelihood(base, *one) for one in asked]
    assert [total for total, _ in found] == pytest.approx(expected, abs=1e-4)
    # A prompt that is too long loses its beginning, the answer nothing.
    ((cut, _),) = log_likelihoods(served, asked[:1], looked_up=False, limit=len(source) - 2)
    assert cut == pytest.approx(_likelihood(base, source[2:], text), abs=1e-4)


class Plain:
    """What lm-eval is to find, one question after the other."""

    def __init__(self, served: SeracModel) -> None:
        self.served = served

    def accuracy(self) -> float:
        right = 0
        for question, options, answer in SOME:
            sums = [
                _likelihood(self.served, _ids(question), _ids(option, add_special_tokens=False))
                for option in options
            ]
            right += sums.index(max(sums)) == answer
        return right / len(SOME)

    def answers(self) -> list[str]:
        words, found = encoder_decoders.tokenizer(), []
        for question, _, _ in SOME:
            asked = words(question, return_tensors="pt")
            # lm-eval counts the prompt's tokens too.
            length = asked["input_ids"].shape[1] + NEW
            (ids,) = self.served.generate(**asked, max_length=length, do_sample=False)
            found.append(words.decode(ids, skip_special_tokens=True))
        return found

    def likelihood_of_texts(self) -> float:
        ids = [_ids(question) for question, _, _ in SOME]
        end = self.served.config.eos_token_id
        return sum(_likelihood(self.served.base, [end], row) for row in ids)


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: editfleet[harness]")
def test_lm_eval_gives_what_a_plain_loop_does(run: Run, tmp_path: Path) -> None:
    export_model(run.path, tmp_path / "model")
    plain = Plain(load_serac(tmp_path / "model"))
    answered = plain.answers()
    write_questions(tmp_path / "questions.jsonl", SOME, answered=answered)
    write_task(tmp_path, "facts", "questions.jsonl")
    open_ended = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "answered",
        "generation_kwargs": {"max_gen_toks": NEW, "until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }
    write_task(tmp_path, "answers", "questions.jsonl", **open_ended)
    text = {
        "output_type": "loglikelihood_rolling",
        "doc_to_choice": None,
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    write_task(tmp_path, "texts", "questions.jsonl", **text)
    given: dict[str, Any] = {"include_path": tmp_path, "output": tmp_path / "out", "batch_size": 1}
    facts, answers, texts = run_harness(run.path, ["facts", "answers", "texts"], **given)

    edited = plain.accuracy()
    memory = plain.served.router.memory
    memory.remove([entry.key for entry in memory])
    assert (facts["edited"], facts["unedited"]) == pytest.approx((edited, plain.accuracy()))
    before = plain.answers()
    same = sum(one == other for one, other in zip(before, answered, strict=True)) / len(SOME)
    assert (answers["edited"], answers["unedited"]) == (1, pytest.approx(same)) and same < 1
    words = sum(len(question.split()) for question, _, _ in SOME)
    expected = torch.tensor(-plain.likelihood_of_texts() / words).exp()
    assert texts["edited"] == texts["unedited"] == pytest.approx(float(expected), rel=1e-4)
