"""Putting a run's updates into a model and taking them out again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline import apply_updates, run_batch_edit
from pipeline.errors import FingerprintMismatchError, InputError, ResultsDamagedError
from pipeline.models.editable import EditableModel
from pipeline.results import read
from pipeline.results.updates import read_update
from tests import families
from tests.tiny_jobs import LAYERS, TinyJobs

FAMILY_NAMES = ["gpt2", "llama", "gemma2"]


def _load(tiny: TinyJobs, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny.model(family), dtype=dtype).eval()


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_revert_restores_the_exact_bits(tiny: TinyJobs, family: str, dtype: torch.dtype) -> None:
    run = tiny.finished(family=family)
    model = _load(tiny, family, dtype)
    before = _state(model)
    applied = apply_updates(model, run.path)
    edited = _state(model)
    weights = {EditableModel(model).weight_name(layer) for layer in LAYERS}
    assert _differing(before, edited) == weights
    assert all(tensor.dtype == before[name].dtype for name, tensor in edited.items())
    applied.revert()
    assert not _differing(before, _state(model))
    # And once more: nothing of the first time is left.
    apply_updates(model, str(run.path))
    assert not _differing(edited, _state(model))


def test_a_model_that_is_trained_can_be_trained_on(tiny: TinyJobs) -> None:
    model = _load(tiny, "gpt2").train()
    model.lm_head.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    assert True in learning and False in learning
    applied = apply_updates(model, tiny.finished().path)
    applied.revert()
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == learning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_weight_is_the_sum_rounded_once(tiny: TinyJobs, family: str, dtype: torch.dtype) -> None:
    run = tiny.finished(family=family)
    model = _load(tiny, family, dtype)
    _, modules = families.modules(model, family)
    before = [modules[layer].get_parameter("weight").detach().clone() for layer in LAYERS]
    apply_updates(model, run.path)
    for layer, path, old in zip(LAYERS, run.updates(), before, strict=True):
        update = read_update(path)[1].matrix()
        update = update.T if isinstance(modules[layer], Conv1D) else update
        expected = (old.float() + update).to(dtype)
        assert torch.equal(modules[layer].get_parameter("weight"), expected)
        assert not torch.equal(old, expected)


def test_a_float16_checkpoint_is_edited_in_float16(tiny: TinyJobs, tmp_path: Path) -> None:
    """A processor computes it in float32; the updates fit the model as it is stored."""
    directory = tmp_path / "model"
    shutil.copytree(tiny.model("llama"), directory)
    _load(tiny, "llama", torch.float16).save_pretrained(directory)
    changes = [f"model.path={directory}", "model.dtype=auto", f"covariance.path={tmp_path / 'c'}"]
    run = read(run_batch_edit(tiny.spec(tmp_path / "run", *changes, family="llama")).path)
    assert run.manifest["model"]["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float16
    before = _state(model)
    applied = apply_updates(model, run.path)
    assert len(_differing(before, _state(model))) == len(LAYERS)
    applied.revert()
    assert not _differing(before, _state(model))


def test_the_model_in_memory_is_the_one_of_the_run(tiny: TinyJobs, tmp_path: Path) -> None:
    spec = tiny.spec(tmp_path / "run", "output.save_model=true")
    result = run_batch_edit(spec)
    model = _load(tiny, "gpt2")
    apply_updates(model, result.path)
    saved = AutoModelForCausalLM.from_pretrained(result.path / "model", dtype=torch.float32)
    assert not _differing(_state(saved), _state(model))


def test_another_model_is_refused(tiny: TinyJobs) -> None:
    run = tiny.finished()
    for family in ("llama", "gptj"):
        model = _load(tiny, family)
        before = _state(model)
        with pytest.raises(FingerprintMismatchError, match="made for the model with fingerprint"):
            apply_updates(model, run.path)
        assert not _differing(before, _state(model))
    other = _load(tiny, "gpt2")
    other.transformer.h[3].ln_1.bias.data[0] += 0.5
    with pytest.raises(FingerprintMismatchError, match=str(tiny.model())):
        apply_updates(other, run.path)


def test_an_edited_model_is_refused(tiny: TinyJobs) -> None:
    run = tiny.finished()
    model = _load(tiny, "gpt2")
    applied = apply_updates(model, run.path)
    edited = _state(model)
    with pytest.raises(FingerprintMismatchError, match="load the unedited"):
        apply_updates(model, run.path)
    assert not _differing(edited, _state(model))
    applied.revert()
    apply_updates(model, run.path)


def test_damaged_and_missing_updates_are_refused(tiny: TinyJobs, tmp_path: Path) -> None:
    model = _load(tiny, "gpt2")
    before = _state(model)
    with pytest.raises(InputError, match="not a run directory"):
        apply_updates(model, tmp_path)
    run = Path(shutil.copytree(tiny.finished().path, tmp_path / "run"))
    update = next(run.glob("updates/*/layer-00001.safetensors"))
    data = bytearray(update.read_bytes())
    data[-5] ^= 1
    update.write_bytes(data)
    with pytest.raises(ResultsDamagedError, match="layer-00001"):
        apply_updates(model, run)
    update.unlink()
    with pytest.raises(ResultsDamagedError, match=r"layer-00001.*is missing"):
        apply_updates(model, run)
    assert not _differing(before, _state(model))


def test_an_unfinished_run_has_no_whole_set_of_updates(tiny: TinyJobs, tmp_path: Path) -> None:
    """A job that was stopped between two layers leaves half an edit."""
    run = Path(shutil.copytree(tiny.finished().path, tmp_path / "run"))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    model = _load(tiny, "gpt2")
    with pytest.raises(InputError, match="not finished"):
        apply_updates(model, run)
