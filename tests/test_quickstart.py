"""The main job on the embedded default, through the command, on local Ray with two workers."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.results import read


@pytest.mark.cluster
def test_quickstart_edits_the_embedded_model(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli import main; main()", "quickstart"],
        cwd=tmp_path,
        env={**_environment(), "EDITFLEET_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    assert "harmonic mean" in ended.stdout and "200 applied" in ended.stdout
    assert "Traceback" not in ended.stderr
    run = read(tmp_path / "runs" / "quickstart")
    run.verify()
    assert run.edits().num_rows == 200
    assert run.manifest["workers"]["count"] == 2
    before, after = run.summary["evaluation"]["rounds"]
    assert before["ES"]["score"] < 5 and before["NS"]["score"] > 95
    assert after["ES"]["score"] >= 90 and after["NS"]["score"] >= 90
    assert after["PS"]["score"] > 80


def _environment() -> dict[str, str]:
    import os

    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
