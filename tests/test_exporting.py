"""The edited model on disk: what plain transformers loads is what the run computed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline import JobSpec, apply_updates, export_model, run_batch_edit
from pipeline.errors import FingerprintMismatchError, InputError
from pipeline.models.loading import fingerprint
from pipeline.results import Run, read
from tests import families
from tests.tiny_jobs import TRAININGS, TinyJobs, changed, records

FAMILY_NAMES = ["gpt2", "gptj", "llama", "gemma2"]


def _load(directory: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


@torch.no_grad()
def _logits(model: PreTrainedModel, directory: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(families.SENTENCES, return_tensors="pt", padding=True)
    return model(**batch).logits


def _with_model(tiny: TinyJobs, output: Path, *changes: str, **choices: Any) -> Run:
    return read(
        run_batch_edit(tiny.spec(output, "output.save_model=true", *changes, **choices)).path
    )


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *((None, family) for family in FAMILY_NAMES),
        *((method, "llama") for method in ("ft", "ultraedit", "rome", "kn")),
        *((method, "gpt2") for method in TRAININGS),
    ],
)
def test_the_exported_model_is_the_edited_one(
    tiny: TinyJobs, tmp_path: Path, method: str | None, family: str
) -> None:
    """To the bit, in plain transformers: the same logits as the model edited in memory."""
    if method is None:
        run = tiny.finished(family=family)
    else:
        content = records(1 if method in ("rome", "ke") else 3)
        changes = ("evaluation.baseline=false", "evaluation.probes=[rewrite]")
        run = tiny.finished(*tiny.method(method), *changes, family=family, requests=content)
    export_model(run.path, tmp_path / "edited")
    exported = _load(tmp_path / "edited")
    in_memory = _load(tiny.model(family), torch.float32)
    clean = _logits(in_memory, tiny.model(family))
    applied = apply_updates(in_memory, run.path)
    logits = _logits(exported, tmp_path / "edited")
    assert exported.dtype == torch.float32
    assert torch.equal(logits, _logits(in_memory, tiny.model(family)))
    assert not torch.equal(logits, clean)
    assert fingerprint(exported) != run.manifest["model"]["fingerprint"]
    applied.revert()
    assert torch.equal(_logits(in_memory, tiny.model(family)), clean)


def test_saving_with_the_run_is_exporting_later(tiny: TinyJobs, tmp_path: Path) -> None:
    run = _with_model(tiny, tmp_path / "run")
    export_model(run.path, tmp_path / "later")
    names = {path.name for path in (tmp_path / "later").iterdir()}
    assert names == {path.name for path in (run.path / "model").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    for name in names:
        assert (tmp_path / "later" / name).read_bytes() == (run.path / "model" / name).read_bytes()


def test_a_bfloat16_run_saves_a_bfloat16_model(tiny: TinyJobs, tmp_path: Path) -> None:
    changes = ["model.dtype=bfloat16", f"covariance.path={tmp_path / 'covariances'}"]
    run = _with_model(tiny, tmp_path / "run", *changes, family="llama")
    saved = _load(run.path / "model")
    assert saved.dtype == torch.bfloat16 and run.manifest["model"]["dtype"] == "bfloat16"
    export_model(run.path, tmp_path / "later")
    later = _load(tmp_path / "later")
    weights = later.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved.state_dict().items())


@pytest.mark.parametrize("where", ["run", "export"])
def test_the_model_card_names_base_method_and_count(
    tiny: TinyJobs, tmp_path: Path, where: str
) -> None:
    directory = tmp_path / "run" / "model"
    _with_model(tiny, tmp_path / "run", requests=records(4))
    if where == "export":
        directory = tmp_path / "later"
        export_model(tmp_path / "run", directory)
    card = ModelCard.load(directory / "README.md")
    base = str(tiny.model())
    assert card.data.base_model == base and "memit" in card.data.tags
    assert card.data.library_name == "transformers"
    assert f"4 facts of `{base}`" in card.text and "MEMIT (layers 0, 1)" in card.text
    assert read(tmp_path / "run").manifest["model"]["fingerprint"] in card.text
    assert "{" not in card.text.replace("`{}`", "")


def test_generation_settings_and_template_travel_along(tiny: TinyJobs, tmp_path: Path) -> None:
    """The saved tokenizer is the base model's, also in what it does with special tokens."""
    run = tiny.finished(family="llama")
    export_model(run.path, tmp_path / "edited")
    base, saved = (
        AutoTokenizer.from_pretrained(path) for path in (tiny.model("llama"), tmp_path / "edited")
    )
    assert base(families.SENTENCES)["input_ids"] == saved(families.SENTENCES)["input_ids"]
    assert base.special_tokens_map == saved.special_tokens_map


def test_an_existing_directory_is_refused(tiny: TinyJobs, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        export_model(tiny.finished().path, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_an_unfinished_run_is_refused(tiny: TinyJobs, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny.finished().path, tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    with pytest.raises(InputError, match="not finished"):
        export_model(run, tmp_path / "edited")
    assert not (tmp_path / "edited").exists()


def test_a_model_that_changed_since_is_refused(tiny: TinyJobs, tmp_path: Path) -> None:
    shutil.copytree(tiny.model(), tmp_path / "model")
    settings = changed(tiny.settings(tmp_path / "run"), f"model.path={tmp_path / 'model'}")
    run_batch_edit(JobSpec.model_validate(settings))
    model = _load(tmp_path / "model")
    model.transformer.h[2].attn.c_proj.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FingerprintMismatchError):
        export_model(tmp_path / "run", tmp_path / "edited")
    assert [path.name for path in tmp_path.iterdir() if "edited" in path.name] == []
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.path"):
        export_model(tmp_path / "run", tmp_path / "edited")


def test_what_an_interrupted_export_left_is_replaced(tiny: TinyJobs, tmp_path: Path) -> None:
    (tmp_path / ".edited.tmp").mkdir()
    (tmp_path / ".edited.tmp" / "half.safetensors").write_bytes(b"half")
    export_model(tiny.finished().path, tmp_path / "edited")
    assert not (tmp_path / ".edited.tmp").exists()
    assert not (tmp_path / "edited" / "half.safetensors").exists()


def test_parents_of_the_directory_are_made(tiny: TinyJobs, tmp_path: Path) -> None:
    export_model(tiny.finished().path, tmp_path / "a" / "b" / "edited")
    assert (tmp_path / "a" / "b" / "edited" / "config.json").is_file()
