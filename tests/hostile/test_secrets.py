"""Secrets of the environment reach no run directory, no log and no message."""

import logging
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.results import read
from tests.tiny_jobs import TinyJobs, records

MARKER = "hf_markerSECRETmarkerSECRETmarkerSECRET"
NAMES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"),
    *("AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY"),
)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, MARKER)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("output.save_model=true", 2),
        ("model.path=nobody/no-such-model", 2),
        ("covariance.corpus=nobody/no-such-corpus", 2),
        ("method.layers=[9]", 2),
        ("method.max_drift=1.0e-9", 1),
        (f"model.revision={MARKER}", 2),
        (f"model.token={MARKER}", 2),
        (f"name=[{MARKER}]", 2),
        (f"cluster.workers={MARKER}", 2),
        (f"cluster.workers: {MARKER}", 2),
    ],
)
def test_secrets_are_never_written(
    tiny: TinyJobs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    change: str,
    code: int,
) -> None:
    """In a job that works, and in those that end early in one way or another."""
    content = records(4)
    content[1]["requested_rewrite"]["prompt"] = "no place"
    settings = tiny.settings(tmp_path / "run", requests=content)
    spec = tiny.spec_file(tmp_path / "spec.yaml", settings)
    with caplog.at_level(logging.DEBUG), pytest.raises(SystemExit) as caught:
        main(["edit", str(spec), "--set", change])
    assert caught.value.code == code
    out, err = capsys.readouterr()
    assert out + err, "something was said"
    assert MARKER not in out and MARKER not in err and MARKER not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if MARKER.encode() in path.read_bytes()]
    if code == 2 and change.startswith("output"):
        assert read(tmp_path / "run").manifest["status"] == "finished" and len(files) > 10
