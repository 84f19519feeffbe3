"""The command line: bad input gives one line and exit code 2, and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BloomConfig, BloomForCausalLM

from pipeline.cli import main
from pipeline.results import read
from tests import families
from tests.tiny_jobs import TinyJobs, changed, records, statuses


def _end(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, _, err = _end(capsys, *arguments)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("editfleet: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture
def edit(tiny: TinyJobs, tmp_path: Path) -> Any:
    """Write a spec with changes; return the arguments of `edit` for it, and the run directory."""

    def write(*changes: str, **choices: Any) -> tuple[list[str], Path]:
        run = tmp_path / "run"
        settings = changed(tiny.settings(run, **choices), *changes)
        return ["edit", str(tiny.spec_file(tmp_path / "spec.yaml", settings))], run

    return write


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _end(capsys, "--help")
    assert code == 0
    assert all(name in out for name in ("edit", "covariance", "export", "quickstart", "factworld"))
    assert _end(capsys, "--version")[1].startswith("editfleet ")


def test_a_run_prints_its_summary(edit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, run = edit()
    code, out, err = _end(capsys, *arguments)
    assert code == 0, err
    assert "rewrite (ES)" in out and "12 applied" in out and str(run) in out.replace("\n", "")
    assert "rewrite (ES)" in _end(capsys, "summary", str(run))[1]
    assert _end(capsys, "export", str(run), str(run / "exported"))[0] == 0


def test_covariances_alone(edit: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments, run = edit(f"covariance.path={tmp_path / 'covariances'}")
    code, out, err = _end(capsys, "covariance", *arguments[1:])
    assert code == 0, err
    assert "layer 1: 64 x 64 from" in out
    assert len(list((tmp_path / "covariances").iterdir())) == 2
    assert not run.exists()


def test_refused_requests_are_listed_and_the_rest_goes_on(
    edit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    content = records(6)
    content[1]["requested_rewrite"]["prompt"] = "no place for a subject"
    content[2]["requested_rewrite"]["target_new"]["str"] = "  "
    content[3]["case_id"] = content[0]["case_id"]
    twin = json.loads(json.dumps(content[4]))
    twin["case_id"], twin["requested_rewrite"]["target_new"]["str"] = 99, "Latin"
    content[5]["paraphrase_prompts"] = ["very " * 400 + "long"]
    arguments, run = edit(requests=[*content, twin])
    code, out, _ = _end(capsys, *arguments)
    assert code == 2
    assert statuses(read(run)) == {"applied": 1, "rejected": 4, "conflict": 2}
    for said in ("row 1, field", "row 2, field", "row 3, field", "paraphrase[0]", "conflict: 4"):
        assert said in out, said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("requets.limit=3", "did you mean 'requests'"),
        ("method.value.step=3", "did you mean 'steps'"),
        ("method.layers=[3, 9]", "method.layers: 9 does not exist"),
        ("method.layers=[2, 1]", "ascend"),
        ("model.path=/no/such/model", "model.path"),
        ("requests.path=/no/such/file.json", "/no/such/file.json"),
        ("requests.format=counterfacts", "did you mean counterfact"),
        ("requests.offset=1000", "offset"),
        ("method.contexts=['no place']", "contexts"),
        ("covariance={path: /tmp/editfleet-nothing-here}", "give covariance.corpus"),
        ("cluster.workers=0", "cluster.workers"),
    ],
)
def test_wrong_settings(
    edit: Any, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    arguments, run = edit(change)
    assert said in _refused(capsys, *arguments)
    assert not run.exists()


def test_wrong_overrides_and_files(
    edit: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments, run = edit()
    assert "field.path=value" in _refused(capsys, *arguments, "--set", "requests.limit")
    assert "no-spec.yaml" in _refused(capsys, "edit", str(tmp_path / "no-spec.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1", encoding="utf-8")
    assert "not valid YAML" in _refused(capsys, "edit", str(bad))
    bad.write_text("- a list", encoding="utf-8")
    assert "mapping" in _refused(capsys, "edit", str(bad))
    requests = tmp_path / "requests.json"
    for content, said in ((b"[{\xff}]", "UTF-8"), (b"[{]", "JSON"), (b"[]", "empty")):
        requests.write_bytes(content)
        message = _refused(capsys, *arguments, "--set", f"requests.path={requests}")
        assert said in message or "no records" in message or "holds" in message
        assert "requests.json" in message
    assert not run.exists()


def test_no_request_that_can_be_edited(edit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    content = records(1)
    content[0]["requested_rewrite"]["subject"] = ""
    arguments, run = edit(requests=content)
    assert "no request can be edited" in _refused(capsys, *arguments)
    assert not run.exists()


def test_a_run_directory_is_never_overwritten(
    edit: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, run = edit()
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    assert "not empty" in _refused(capsys, *arguments)
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


def test_models_that_cannot_be_edited(
    edit: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: TinyJobs
) -> None:
    tokenizer = families.build_tokenizer()
    bloom = tmp_path / "bloom"
    config = BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(bloom)
    tokenizer.save_pretrained(bloom)
    arguments, run = edit(f"model.path={bloom}", "method.layers=[0]")
    assert "'bloom' is not supported" in _refused(capsys, *arguments)
    bert = tmp_path / "bert"
    BertModel(
        BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(bert)
    arguments, run = edit(f"model.path={bert}", "method.layers=[0]")
    assert "'bert' is not supported" in _refused(capsys, *arguments)
    headless = tmp_path / "headless"
    families.build("llama", torch.float32).model.save_pretrained(headless)
    tokenizer.save_pretrained(headless)
    arguments, run = edit(f"model.path={headless}")
    assert "lacks" in _refused(capsys, *arguments)
    pickled = tmp_path / "pickled"
    families.save("gpt2", pickled)
    weights = pickled / "model.safetensors"
    torch.save(families.build("gpt2", torch.float32).state_dict(), pickled / "pytorch_model.bin")
    weights.unlink()
    arguments, run = edit(f"model.path={pickled}")
    assert "safetensors only" in _refused(capsys, *arguments)
    assert not run.exists()


def test_a_covariance_of_another_model_is_refused(
    edit: Any, capsys: pytest.CaptureFixture[str], tiny: TinyJobs
) -> None:
    tiny.finished(family="llama")
    arguments, run = edit(f"covariance.path={tiny.root / 'covariances' / 'llama'}")
    assert "fingerprint" in _refused(capsys, *arguments)
    assert not run.exists()
