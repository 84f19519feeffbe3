"""Every spec that is shipped is valid, and every job is a thin door to the command."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.spec import load_spec

JOBS = Path(__file__).parents[2] / "jobs"
ARGUMENTS = ["model.path=m", "requests.path=r", "covariance.corpus=c"]


@pytest.mark.parametrize("path", sorted(JOBS.glob("specs/*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_spec_is_valid(path: Path) -> None:
    assert load_spec(path, ARGUMENTS).name


def test_paths_of_the_counterfact_spec_are_arguments() -> None:
    with pytest.raises(InputError, match=r"model\.path"):
        load_spec(JOBS / "specs" / "counterfact_12m.yaml")


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.py")), ids=lambda path: path.stem)
def test_a_job_explains_itself(path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(path), "--help"],
        cwd=JOBS.parent,
        env={"PYTHONPATH": str(JOBS.parent), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "SPEC" in ended.stdout
