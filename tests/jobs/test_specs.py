"""The specs and scripts that are shipped: they fit the settings as they are today."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.cluster.plan import make_plan
from pipeline.errors import InputError
from pipeline.spec import JobSpec, load_spec

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "jobs" / "specs").glob("*.yaml"))
SCRIPTS = sorted((ROOT / "jobs").glob("*.py"))

# Paths that a spec leaves to its user.
ARGUMENTS = {
    name: [
        "model.path=MODEL",
        "requests.path=COUNTERFACT.json",
        "covariance.corpus=CORPUS.json",
    ]
    for name in (
        "counterfact_12m",
        "sequential_counterfact_12m",
        "compare_counterfact_12m",
        "survey_counterfact_12m",
    )
} | {
    f"{job}_counterfact_12m": ["model.path=MODEL", "requests.path=COUNTERFACT.json"]
    for job in ("trace", "train_mend", "train_malmen", "train_ke", "train_serac")
}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_is_valid(path: Path) -> None:
    spec = load_spec(path, ARGUMENTS.get(path.stem))
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert spec.name == written.get("name", JobSpec().name)
    for part, settings in written.items():
        if isinstance(settings, dict):
            assert set(settings) <= set(spec.model_dump()[part])


def test_what_the_user_has_to_name_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"counterfact_12m\.yaml: model\.path"):
        load_spec(ROOT / "jobs" / "specs" / "counterfact_12m.yaml")
    covered = {path.stem for path in SPECS}
    assert set(ARGUMENTS) <= covered


def test_quickstart_is_what_the_command_does() -> None:
    """`editfleet quickstart` and its spec promise to be one job."""
    spec = load_spec(ROOT / "jobs" / "specs" / "quickstart.yaml")
    command = load_spec(None, ["name=quickstart", "requests.limit=200", "cluster.workers=2"])
    assert spec == command
    assert make_plan(spec).num_requests == 200


def test_the_real_spec_fits_the_real_model(shared: Path) -> None:
    paths = [
        f"model.path={shared / 'models' / 'counterfact-12m'}",
        f"requests.path={shared / 'data' / 'counterfact_20k.json'}",
    ]
    overrides = [*ARGUMENTS["counterfact_12m"], *paths]
    spec = load_spec(ROOT / "jobs" / "specs" / "counterfact_12m.yaml", overrides)
    plan = make_plan(spec)
    assert plan.num_requests == 1000 and plan.spec.method.covariance_weight == 1600


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_the_command(script: Path, tmp_path: Path) -> None:
    """Run from elsewhere, as `ray job submit` does with an uploaded folder on the path."""

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, str(script), *arguments],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    helped = run("--help")
    assert helped.returncode == 0 and "SPEC" in helped.stdout and "--set" in helped.stdout
    refused = run(str(tmp_path / "none.yaml"))
    assert refused.returncode == 2 and refused.stderr.startswith("editfleet: ")
