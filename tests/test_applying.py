"""A run's updates in a plain transformers model: applied, taken out again, exported."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pipeline import apply_updates, export_model, run_batch_edit
from pipeline.errors import FingerprintMismatchError, InputError, ResultsDamagedError
from pipeline.results import read
from tests.tiny_jobs import TinyJobs


def _load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def _differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_go_in_and_out_to_the_bit(tiny: TinyJobs, family: str, dtype: torch.dtype) -> None:
    run = tiny.finished(family=family)
    model = _load(tiny.model(family), dtype)
    before = _weights(model)
    applied = apply_updates(model, run.path)
    after = _weights(model)
    edited = {path.stem for path in run.updates()}
    assert len(_differing(before, after)) == len(edited) == 2
    applied.revert()
    assert not _differing(before, _weights(model))


def test_another_model_and_an_edited_one_are_refused(tiny: TinyJobs) -> None:
    run = tiny.finished()
    with pytest.raises(FingerprintMismatchError, match="fingerprint"):
        apply_updates(_load(tiny.model("llama")), run.path)
    model = _load(tiny.model())
    apply_updates(model, run.path)
    with pytest.raises(FingerprintMismatchError, match="load the unedited"):
        apply_updates(model, run.path)


def test_a_damaged_update_is_refused(tiny: TinyJobs, tmp_path: Path) -> None:
    result = run_batch_edit(tiny.spec(tmp_path / "run"))
    path = read(result.path).updates()[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    model = _load(tiny.model())
    before = _weights(model)
    with pytest.raises(ResultsDamagedError, match=path.name):
        apply_updates(model, result.path)
    assert not _differing(before, _weights(model))


def test_saved_and_exported_models_are_the_edited_model(tiny: TinyJobs, tmp_path: Path) -> None:
    result = run_batch_edit(tiny.spec(tmp_path / "run", "output.save_model=true"))
    export_model(result.path, tmp_path / "exported")
    model = _load(tiny.model())
    apply_updates(model, result.path)
    expected = _weights(model)
    for directory in (result.path / "model", tmp_path / "exported"):
        assert not _differing(expected, _weights(_load(directory)))
        AutoTokenizer.from_pretrained(directory)
        card = (directory / "README.md").read_text(encoding="utf-8")
        assert "12 facts" in card and "knowledge-editing" in card
    assert not list(tmp_path.glob(".*"))


def test_an_export_never_overwrites(tiny: TinyJobs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        export_model(tiny.finished().path, tmp_path)
