"""The command: what it prints, how it exits, and what it leaves when the input is wrong."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
)

from pipeline.cli import main
from pipeline.results import read
from tests import families
from tests.tiny_jobs import TinyJobs, changed, digests, records, statuses

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from pipeline.cli import main; main()"]


class Finished(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Finished]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command in this process."""
    # A process of its own reads the first two when it imports transformers, which is done here.
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        code = caught.value.code
        captured = capsys.readouterr()
        return Finished(0 if code is None else int(code), captured.out, captured.err)

    return run


@pytest.fixture
def spec(tiny: TinyJobs, tmp_path: Path) -> Path:
    """A spec that runs; tests break one thing of it."""
    tiny.finished()  # has the covariances ready
    return tiny.spec_file(tmp_path / "spec.yaml", tiny.settings(tmp_path / "out"))


def _assert_refused(result: Finished, tmp_path: Path, *parts: str) -> None:
    """Exit code 2, one line on standard error that says it all, and nothing left behind."""
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith("editfleet: ")]
    assert len(lines) == 1 and "Traceback" not in result.err, result.err
    assert result.err.strip().splitlines() == lines, "one line and no other"
    for part in parts:
        assert part in lines[0]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/*.tmp"))


# --- specs --------------------------------------------------------------------------------------


def test_a_spec_that_cannot_be_read(cli: Cli, tmp_path: Path) -> None:
    for command in ("edit", "covariance"):
        result = cli(command, tmp_path / "none.yaml")
        _assert_refused(result, tmp_path, str(tmp_path / "none.yaml"), "No such file")
    (tmp_path / "broken.yaml").write_text("model: [1\nname: {", encoding="utf-8")
    _assert_refused(cli("edit", tmp_path / "broken.yaml"), tmp_path, "not valid YAML", "line 2")
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    _assert_refused(cli("edit", tmp_path / "latin.yaml"), tmp_path, "not valid YAML")
    (tmp_path / "list.yaml").write_text("- name: x", encoding="utf-8")
    _assert_refused(cli("edit", tmp_path / "list.yaml"), tmp_path, "mapping of settings, got list")
    _assert_refused(cli("edit", tmp_path), tmp_path, "cannot read the spec")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method.layer=[1]", ["method.layer", "did you mean 'layers'?"]),
        ("methods.layers=[1]", ["methods", "did you mean 'method'?"]),
        ("method.layers", ["--set 'method.layers'", "field.path=value"]),
        ("=3", ["--set '=3'", "field.path=value"]),
        ("method.layers=[1", ["--set 'method.layers=[1'", "not valid YAML"]),
        ("name.x=1", ["name", "not a group"]),
        ("method.layers=[2, 1]", ["method", "layers must ascend"]),
        ("method.layers=[9]", ["method.layers", "9 does not exist", "0 to 3"]),
        ("method.value.loss_layer=1", ["method.value.loss_layer", "last block"]),
        ("method.covariance_weight=-3", ["method.covariance_weight", "greater than 0", "-3"]),
        ("method.contexts=['no place']", ["method", "contexts: 'no place'", "{}"]),
        ("cluster.workers=0", ["cluster.workers"]),
        ("cluster.engine=slurm", ["cluster.engine", "in_process"]),
        ("requests.format=conterfact", ["requests.format", "did you mean counterfact?"]),
        ("requests.limit=0", ["requests.limit"]),
        ("requests.offset=1000", ["requests.offset 1000 leaves none"]),
        ("evaluation.probes=[rewrites]", ["evaluation.probes"]),
        ("model.dtype=int8", ["model.dtype"]),
        ("name=a/b", ["name"]),
    ],
)
def test_a_wrong_setting(
    cli: Cli, spec: Path, tmp_path: Path, override: str, parts: list[str]
) -> None:
    _assert_refused(cli("edit", spec, "--set", override), tmp_path, *parts)


def test_settings_can_be_overridden_more_than_once(cli: Cli, spec: Path, tmp_path: Path) -> None:
    result = cli(
        "edit",
        spec,
        "--set",
        "requests.limit=2",
        "--set",
        "evaluation.probes=[rewrite]",
        "--set",
        "requests.limit=3",
    )
    assert result.code == 0, result
    run = read(tmp_path / "out")
    assert run.edits().num_rows == 3 and run.metrics().num_rows == 6
    assert run.manifest["spec"]["requests"]["limit"] == 3


# --- models -------------------------------------------------------------------------------------


def _copy(tiny: TinyJobs, tmp_path: Path, *without: str) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(tiny.model(), directory)
    for pattern in without:
        for path in directory.glob(pattern):
            path.unlink()
    return directory


def test_a_model_that_is_not_there(cli: Cli, spec: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", "no-such-name-of-a-model", "nobody/no-such-model"):
        result = cli("edit", spec, "--set", f"model.path={path}")
        _assert_refused(result, tmp_path, "model.path", str(path))
    (tmp_path / "empty").mkdir()
    result = cli("edit", spec, "--set", f"model.path={tmp_path / 'empty'}")
    _assert_refused(result, tmp_path, "model.path", "config.json")


def test_a_model_without_tokenizer(cli: Cli, tiny: TinyJobs, spec: Path, tmp_path: Path) -> None:
    """Transformers makes an empty one in its place, which gives no text a token."""
    model = _copy(tiny, tmp_path, "token*")
    result = cli("edit", spec, "--set", f"model.path={model}", "--set", f"covariance.path={model}")
    _assert_refused(result, tmp_path, "model.path", "tokenizer")
    assert not list(model.glob("layer-*")), "no covariance of no token is kept"


def test_a_model_without_weights(cli: Cli, tiny: TinyJobs, spec: Path, tmp_path: Path) -> None:
    model = _copy(tiny, tmp_path, "*.safetensors")
    result = cli("edit", spec, "--set", f"model.path={model}")
    _assert_refused(result, tmp_path, "model.path", str(model), "safetensors")


def test_pickled_weights_are_loaded_only_when_allowed(
    cli: Cli, tiny: TinyJobs, spec: Path, tmp_path: Path
) -> None:
    model = _copy(tiny, tmp_path, "*.safetensors")
    torch.save(families.build("gpt2", torch.float32).state_dict(), model / "pytorch_model.bin")
    result = cli("edit", spec, "--set", f"model.path={model}")
    _assert_refused(result, tmp_path, "model.path", "safetensors only")
    allowed = cli("edit", spec, "--set", f"model.path={model}", "--set", "model.allow_pickle=true")
    assert allowed.code == 0
    assert digests(read(tmp_path / "out"))["updates"] == digests(tiny.finished())["updates"]


def test_truncated_weights(cli: Cli, tiny: TinyJobs, spec: Path, tmp_path: Path) -> None:
    weights = _copy(tiny, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    result = cli("edit", spec, "--set", f"model.path={weights.parent}")
    _assert_refused(result, tmp_path, "model.path")


def test_architectures_that_are_not_covered(cli: Cli, spec: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32}
    models = {
        "bloom": AutoModelForCausalLM.from_config(BloomConfig(**small, n_layer=2, n_head=4)),
        "bert": BertLMHeadModel(
            BertConfig(
                **small,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                is_decoder=True,
            )
        ),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        families.build_tokenizer().save_pretrained(tmp_path / name)
        result = cli("edit", spec, "--set", f"model.path={tmp_path / name}")
        _assert_refused(result, tmp_path, f"model type '{name}' is not supported", "gpt2")


# --- requests -----------------------------------------------------------------------------------


def test_request_files_that_cannot_be_read(cli: Cli, spec: Path, tmp_path: Path) -> None:
    files = {
        "broken.json": (b'[{"case_id": 1,}]', ["not JSON at line 1, column 16"]),
        "latin.json": (b'[{"case_id": "caf\xe9"}]', ["not valid UTF-8 at byte 17 (0xe9)"]),
        "object.json": (b"{}", ["expected a list"]),
        "empty.json": (b"[]", ["holds no records"]),
        "nothing.jsonl": (b"", ["holds no records"]),
        "other.json": (b'[{"a": 1}]', ["fit no known layout", "requests.format"]),
        "what.xyz": (b"[]", ["ending .xyz"]),
        "no.parquet": (b"PAR1 and no more", ["no.parquet"]),
    }
    for name, (content, parts) in files.items():
        (tmp_path / name).write_bytes(content)
        result = cli("edit", spec, "--set", f"requests.path={tmp_path / name}")
        _assert_refused(result, tmp_path, str(tmp_path / name), *parts)
    result = cli("edit", spec, "--set", f"requests.path={tmp_path / 'none.json'}")
    _assert_refused(result, tmp_path, "none.json", "no such file")


def test_no_valid_request(cli: Cli, tiny: TinyJobs, tmp_path: Path) -> None:
    content = records(2)
    content[0]["requested_rewrite"]["prompt"] = "no place"
    content[1]["requested_rewrite"]["target_new"]["str"] = ""
    settings = tiny.settings(tmp_path / "out", requests=content)
    result = cli("edit", tiny.spec_file(tmp_path / "spec.yaml", settings))
    _assert_refused(result, tmp_path, "no request can be edited", "row 0", "prompt", "{}")


def test_partly_rejected_requests_finish_with_code_2(
    cli: Cli, tiny: TinyJobs, tmp_path: Path
) -> None:
    content = records(30)
    for record in content[5:28]:
        record["requested_rewrite"]["prompt"] = "no place"
    settings = tiny.settings(tmp_path / "out", requests=content)
    result = cli("edit", tiny.spec_file(tmp_path / "spec.yaml", settings))
    assert result.code == 2 and "Traceback" not in result.err
    run = read(tmp_path / "out")
    assert run.manifest["status"] == "finished" and run.edits().num_rows == 30
    assert statuses(run) == {"applied": 7, "rejected": 23}
    assert "7 applied, 23 rejected, 0 conflict, 0 failed" in result.out
    problems = [line for line in result.out.splitlines() if line.startswith("rejected: ")]
    assert len(problems) == 20 and "row 5, field requested_rewrite.prompt" in problems[0]
    assert "and 3 more" in result.out


def test_failed_requests_finish_with_code_1(cli: Cli, tiny: TinyJobs, tmp_path: Path) -> None:
    """A broken embedding makes one request's search end in NaN; one more is rejected."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny.model("llama"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    byte = families.build_tokenizer()("Ж", add_special_tokens=False)["input_ids"][0]
    weights["model.embed_tokens.weight"][byte] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    content = records(5)
    content[1]["requested_rewrite"]["subject"] = "Жан"
    content[2]["requested_rewrite"]["prompt"] = "no place"
    settings = tiny.settings(tmp_path / "out", family="llama", requests=content)
    settings["model"]["path"] = str(tmp_path / "model")
    settings["covariance"]["path"] = str(tmp_path / "covariances")
    result = cli("edit", tiny.spec_file(tmp_path / "spec.yaml", settings))
    assert result.code == 1
    assert statuses(read(tmp_path / "out")) == {"applied": 3, "failed": 1, "rejected": 1}
    assert re.search(r"^failed: 1: .*NaN", result.out, re.M)


# --- covariances and places ---------------------------------------------------------------------


def test_covariances_that_are_not_there(cli: Cli, spec: Path, tmp_path: Path) -> None:
    path, corpus = f"covariance.path={tmp_path / 'none'}", "covariance.corpus=null"
    for command in ("edit", "covariance"):
        result = cli(command, spec, "--set", corpus, "--set", path)
        _assert_refused(result, tmp_path, "covariance.corpus", str(tmp_path / "none"), "[0, 1]")
        result = cli(command, spec, "--set", corpus, "--set", "covariance.path=null")
        _assert_refused(result, tmp_path, "neither corpus nor path")
    result = cli("edit", spec, "--set", f"covariance.corpus={tmp_path / 'none.txt'}")
    _assert_refused(result, tmp_path, "none.txt", "no such file")
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    result = cli("edit", spec, "--set", f"covariance.corpus={tmp_path / 'blank.txt'}")
    _assert_refused(result, tmp_path, "blank.txt", "holds no texts")


def test_covariances_of_something_else(
    cli: Cli, tiny: TinyJobs, spec: Path, tmp_path: Path
) -> None:
    result = cli("edit", spec, "--set", f"model.path={tiny.model('gptj')}")
    _assert_refused(result, tmp_path, "was made with fingerprint", "covariance.path")
    result = cli("edit", spec, "--set", "covariance.max_tokens=7")
    _assert_refused(result, tmp_path, "was made with max_tokens null, this job has 7")
    (tmp_path / "other.txt").write_text("The house is old.\n" * 99, encoding="utf-8")
    result = cli("edit", spec, "--set", f"covariance.corpus={tmp_path / 'other.txt'}")
    _assert_refused(result, tmp_path, "was made with corpus_digest")


def test_covariances_alone(cli: Cli, spec: Path, tmp_path: Path) -> None:
    own = f"covariance.path={tmp_path / 'own'}"
    first = cli("covariance", spec, "--set", own)
    assert first.code == 0 and re.search(r"layer 1: 64 x 64 from \d{4} tokens", first.out)
    assert str(tmp_path / "own") in first.out
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "own").iterdir()}
    assert len(files) == 2 and not (tmp_path / "out").exists()
    again = cli("covariance", spec, "--set", own)
    assert again.code == 0 and again.out == first.out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "own").iterdir()}


def test_a_run_directory_that_is_not_empty(cli: Cli, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    result = cli("edit", spec)
    assert result.code == 2 and "is not empty; choose another output.path" in result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        result = cli("edit", spec, "--set", f"output.path={output}")
        assert (
            result.code == 2 and result.err.startswith("editfleet: ") and str(output) in result.err
        )
        assert len(result.err.strip().splitlines()) == 1


def test_an_empty_run_directory_is_taken(cli: Cli, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert cli("edit", spec).code == 0


# --- what is printed ----------------------------------------------------------------------------


def test_a_run_prints_its_summary_and_place(cli: Cli, spec: Path, tmp_path: Path) -> None:
    result = cli("edit", spec, "--save-model")
    assert result.code == 0 and (tmp_path / "out" / "model" / "config.json").is_file()
    for part in ("rewrite (ES)", "paraphrase (PS)", "neighbourhood (NS)", "harmonic mean (S)"):
        assert part in result.out
    assert "12 applied, 0 rejected, 0 conflict, 0 failed" in result.out
    assert result.out.splitlines()[-1] == f"run directory: {tmp_path / 'out'}"
    again = cli("summary", tmp_path / "out")
    assert again.code == 0 and again.out in result.out
    exported = cli("export", tmp_path / "out", tmp_path / "edited")
    assert exported.code == 0 and (tmp_path / "edited" / "model.safetensors").is_file()


def test_a_study_prints_a_line_a_scored_round(cli: Cli, spec: Path, tmp_path: Path) -> None:
    rounds = "rounds={size: 5, count: 2, evaluate_every: 1, evaluate: [current, untouched]}"
    result = cli("sequential", spec, "--set", rounds)
    assert result.code == 0, result
    rows = [line.strip("│").split("│") for line in result.out.splitlines() if line[:1] == "│"]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:2] for row in cells] == [["unedited", "10"], ["0", "5"], ["1", "5"]]
    assert all(len(row) == 9 and all(row[2:7]) and row[8] for row in cells)
    assert "10 applied, 0 rejected" in result.out
    assert result.out.splitlines()[-1] == f"run directory: {tmp_path / 'out'}"
    again = cli("summary", tmp_path / "out")
    assert again.code == 0 and again.out in result.out
    exported = cli("export", tmp_path / "out", tmp_path / "edited", "--round", 0)
    assert exported.code == 0 and (tmp_path / "edited" / "model.safetensors").is_file()
    refused = cli("export", tmp_path / "out", tmp_path / "other", "--round", 2)
    assert refused.code == 2 and "has no round 2; its last whole one is 1" in refused.err
    batch = cli("edit", spec, "--set", rounds, "--set", f"output.path={tmp_path / 'batch'}")
    assert batch.code == 2 and "editfleet sequential" in batch.err


def test_a_comparison_prints_a_line_a_study(cli: Cli, spec: Path, tmp_path: Path) -> None:
    rounds = "rounds={size: 5, count: 2, evaluate_every: 1, evaluate: [current, untouched]}"
    given = ("--set", rounds, "--set", "compare.methods=[{}, {name: emmet, label: E}]")
    result = cli("sequential", spec, *given)
    assert result.code == 0, result
    rows = [line.strip("│").split("│") for line in result.out.splitlines() if line[:1] == "│"]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [row[:3] for row in cells] == [["memit", "1", "5"], ["E", "1", "5"]]
    assert all(len(row) == 10 and all(row) for row in cells)
    runs = [tmp_path / "out" / label for label in ("memit", "E")]
    last = [line for line in result.out.splitlines() if line.startswith("run directory: ")]
    assert last == [f"run directory: {run}" for run in runs]
    assert (tmp_path / "out" / "report.html").is_file()
    exported = cli("export", runs[1], tmp_path / "edited", "--round", 0)
    assert exported.code == 0
    again = cli("sequential", spec, *given)
    assert again.code == 0 and again.out == result.out
    refused = cli("sequential", spec, *given, "--set", "compare.seeds=[1, x]")
    assert refused.code == 2 and "compare.seeds.1" in refused.err


@pytest.mark.parametrize(
    ("command", "changes", "printed"),
    [
        ("trace", ["trace={samples: 2, known_only: false}", "requests.limit=2"], "layer"),
        ("assess", ["assess={prompts: 2}"], "facts that the model holds"),
        ("train", ["method={name: mend, mend: {rank: 2}}", "train={steps: 1, batch_size: 2}"],
         "validation"),
    ],
)  # fmt: skip
def test_commands_that_edit_nothing(
    cli: Cli, tiny: TinyJobs, tmp_path: Path, command: str, changes: list[str], printed: str
) -> None:
    settings = tiny.settings(tmp_path / "out", requests=records(6))
    spec = tiny.spec_file(tmp_path / "spec.yaml", changed(settings, *changes))
    result = cli(command, spec)
    assert result.code == 0, result
    assert printed in result.out and f"run directory: {tmp_path / 'out'}" in result.out
    run = read(tmp_path / "out")
    assert run.manifest["status"] == "finished" and not run.updates()
    assert (tmp_path / "out" / "report.html").exists() == (command != "assess")


def test_a_run_that_is_there_is_gone_on_with(cli: Cli, spec: Path, tmp_path: Path) -> None:
    first = cli("edit", spec)
    again = cli("edit", spec)
    assert again.code == 0 and again.out.endswith(first.out)
    status = cli("status", tmp_path / "out", "--verify")
    assert status.code == 0 and f"{tmp_path / 'out'}: finished" in status.out
    assert "4 of 4 shards" in status.out and "11 files are sound" in status.out
    refused = cli("edit", spec, "--set", "seed=3")
    assert refused.code == 2 and "seed was 0 and is 3" in refused.err
    assert len(refused.err.splitlines()) == 1
    anew = cli("edit", spec, "--set", "seed=3", "--restart")
    assert anew.code == 0
    assert anew.out.splitlines()[-1] == f"run directory: {tmp_path / 'out-2'}"
    assert read(tmp_path / "out").manifest["spec"]["seed"] == 0
    part = read(tmp_path / "out").files("metrics")[0]
    part.write_bytes(part.read_bytes()[:-1])
    damaged = cli("status", tmp_path / "out", "--verify")
    assert damaged.code == 1 and "10 files are sound" in damaged.out
    assert "damaged: " in damaged.out and part.name in damaged.out
    assert cli("status", tmp_path / "out").code == 0


def test_runs_that_are_none(cli: Cli, tmp_path: Path) -> None:
    commands = [["summary", tmp_path], ["status", tmp_path]]
    for command in (*commands, ["export", tmp_path, tmp_path / "edited"]):
        _assert_refused(cli(*command), tmp_path, str(tmp_path), "not a run directory")


def test_version_and_help(cli: Cli) -> None:
    try:
        installed = version("editfleet")
    except PackageNotFoundError:
        pytest.skip("editfleet runs from a source checkout here, without a version")
    assert cli("--version") == Finished(0, f"editfleet {installed}\n", "")


def test_help_names_every_command(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    for command in (
        "edit",
        "sequential",
        "quickstart",
        "covariance",
        "summary",
        "status",
        "export",
        "unedit",
        "survey",
        "trace",
        "train",
        "factworld",
    ):
        assert re.search(rf"\b{command}\b", result.out)
        assert cli(command, "--help").code == 0
    assert "--save-model" in cli("edit", "--help").out


def test_unknown_commands_and_options(cli: Cli, spec: Path, tmp_path: Path) -> None:
    for arguments in (["edti", spec], ["edit", spec, "--sett", "x=1"], ["edit"], ["export", spec]):
        result = cli(*arguments)
        assert result.code == 2 and "Traceback" not in result.err and result.err
    assert not (tmp_path / "out").exists()


# --- as a process -------------------------------------------------------------------------------


def _process(*arguments: object, timeout: float = 120, **environment: str) -> Finished:
    result = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Finished(result.returncode, result.stdout, result.stderr)


def test_specs_are_checked_without_torch(tmp_path: Path) -> None:
    """A wrong spec is refused at once: neither torch nor Ray is imported for that."""
    code = (
        "import sys\n"
        "from pipeline.cli import main\n"
        "try:\n"
        f"    main(['edit', {str(tmp_path / 'none.yaml')!r}])\n"
        "except SystemExit as end:\n"
        "    print(end.code, [m for m in ('torch', 'ray', 'transformers') if m in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "2 []\n" and result.stderr.count("\n") == 1


def test_a_process_shows_no_traceback(tiny: TinyJobs, spec: Path, tmp_path: Path) -> None:
    model = _copy(tiny, tmp_path, "*.safetensors")
    result = _process("edit", spec, "--set", f"model.path={model}")
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("editfleet: model.path: cannot load")
    assert not (tmp_path / "out").exists()


def test_a_log_holds_lines_and_no_progress_bars(spec: Path, tmp_path: Path) -> None:
    """Bars of the libraries below, written over and over, make a job's log unreadable."""
    result = _process("edit", spec)
    assert result.code == 0 and "\r" not in result.err and "it/s" not in result.err
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in result.err.splitlines())


@pytest.mark.cluster
def test_a_process_starts_and_ends_its_own_ray(tiny: TinyJobs, spec: Path, tmp_path: Path) -> None:
    """Nothing of it is left: no process, and the run is the same bits as in this process."""
    secret = "hf_marker0000SECRET"
    result = _process(
        "edit",
        spec,
        "--set",
        "cluster.engine=ray",
        "--set",
        "cluster.workers=1",
        timeout=280,
        HF_TOKEN=secret,
        RAY_ADDRESS="",
    )
    assert result.code == 0, result.err
    assert "Traceback" not in result.err and "12 applied" in result.out
    assert "values: 12 of 12" in result.err, "a log without a terminal gets a line a phase"
    assert digests(read(tmp_path / "out")) == digests(tiny.finished())
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert secret not in result.out + result.err


@pytest.mark.cluster
def test_an_address_where_nobody_answers(spec: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    arguments = ["--set", "cluster.engine=ray", "--set", "cluster.address=127.0.0.1:1"]
    result = _process("edit", spec, *arguments, timeout=120)
    assert time.monotonic() - start < 90
    assert result.code == 2 and "Traceback" not in result.err
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("editfleet: cluster.address") and "127.0.0.1:1" in line
    assert not (tmp_path / "out").exists()


def _stopped(spec: Path, number: int, parts: int, run: Path) -> tuple[int, str, int]:
    """Send a signal to the command once the run holds so many values.

    Returns its code, its last line, and how many processes ended with it.
    """
    with subprocess.Popen(
        [*COMMAND, "edit", str(spec)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": "", _MARK: str(run)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while len(list(run.glob("values/*.parquet"))) < parts:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        before = _marked(run)
        process.send_signal(number)
        sent = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 10 and "Traceback" not in err
    while left := _marked(run):
        assert time.monotonic() - sent < 15, left
        time.sleep(0.1)
    return process.returncode, err.splitlines()[-1], len(before)


_MARK = "EDITFLEET_TEST_RUN"


def _marked(run: Path) -> list[Path]:
    """The command's process and all that it started."""
    return [p for p in Path("/proc").glob("[0-9]*/environ") if _holds(p, f"{_MARK}={run}".encode())]


def _holds(path: Path, text: bytes) -> bool:
    try:
        return text in path.read_bytes()
    except OSError:  # the process has ended, or is another user's
        return False


def test_signals_end_a_run_that_can_go_on(tiny: TinyJobs, tmp_path: Path) -> None:
    """SIGTERM, then SIGINT to the run that went on: a line each, and what was finished is kept."""
    settings = tiny.settings(tmp_path / "out", requests=records(144))
    settings["cluster"]["shard_size"] = 1
    settings["method"]["value"]["steps"] = 40
    spec, run = tiny.spec_file(tmp_path / "spec.yaml", settings), tmp_path / "out"
    code, line, _ = _stopped(spec, signal.SIGTERM, 2, run)
    assert code == 143 and line == (
        f"editfleet: terminated; what was finished is kept in {run}, and the same command"
        " resumes it"
    )
    first = read(run)
    assert first.manifest["status"] == "interrupted" and first.values().num_rows >= 2
    code, line, _ = _stopped(spec, signal.SIGINT, first.values().num_rows + 2, run)
    assert code == 130 and line.startswith("editfleet: interrupted; what was finished is kept")
    second = read(run)
    assert second.manifest["status"] == "interrupted" and len(second.manifest["resumed"]) == 1
    names = second.values()["case_id"].to_pylist()
    assert set(first.values()["case_id"].to_pylist()) < set(names) and len(names) == len(set(names))
    second.verify()
    assert not (run / ".driver.json").exists() and not list(run.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_workers_of_ray(tiny: TinyJobs, tmp_path: Path, number: int) -> None:
    settings = tiny.settings(tmp_path / "out", requests=records(144))
    settings["cluster"] |= {"shard_size": 1, "engine": "ray", "workers": 2}
    settings["method"]["value"]["steps"] = 40
    spec = tiny.spec_file(tmp_path / "spec.yaml", settings)
    code, line, processes = _stopped(spec, number, 2, tmp_path / "out")
    assert code == 128 + number and "the same command resumes it" in line
    assert processes > 4, "driver, two workers, reducer and Ray's own"
