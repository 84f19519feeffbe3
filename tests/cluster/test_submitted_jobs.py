"""Jobs submitted to a cluster that was started as users start one, with `ray start`."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.results import read
from tests.started import JOB_SERVER, PATIENCE_SECONDS, ROOT, StartedCluster, wait_for
from tests.tiny_jobs import TinyJobs, changed, digests, records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(
        find_spec("aiohttp") is None, reason="needs ray[default]: pip install '.[cluster]'"
    ),
]

REQUESTS = records(24)
# Long enough that `ray job stop`, which takes seconds to start, comes in the middle.
CHANGES = ("method.value.steps=150", "method.value.stop_loss=0.0")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartedCluster]:
    """A cluster of a head and no other node yet."""
    with ExitStack() as ended:
        # Sockets have short names.
        temporary = ended.enter_context(
            tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True)
        )
        cluster = StartedCluster(tmp_path_factory.mktemp("home"), Path(temporary), ended)
        cluster.await_job_server()
        yield cluster


@pytest.fixture
def folder(tiny: TinyJobs, tmp_path: Path) -> Path:
    """A working directory: the package and scripts as in a checkout, and a spec."""
    settings = tiny.settings(tmp_path / "run", requests=REQUESTS)
    settings = changed(settings, *CHANGES)
    settings["cluster"] |= {"engine": "ray", "workers": 2, "gpus_per_worker": 0}
    (tmp_path / "work").mkdir()
    for name in ("pipeline", "jobs"):
        (tmp_path / "work" / name).symlink_to(ROOT / name)
    tiny.spec_file(tmp_path / "work" / "spec.json", settings)
    return tmp_path / "work"


def _job(said: str) -> str:
    """The id in what a submission printed."""
    return re.findall(r"raysubmit_\w+", said)[0]


def _lines(run: Path) -> int:
    listing = run / "manifest.jsonl"
    return len(listing.read_text().splitlines()) if listing.exists() else 0


@pytest.mark.timeout(3 * PATIENCE_SECONDS)
def test_a_submitted_job_waits_for_a_node_is_stopped_and_resumes(
    started: StartedCluster, folder: Path, tiny: TinyJobs
) -> None:
    """From `editfleet submit`, and resumed by `ray job submit`: the same job, and the same bits."""
    address, run = ("--address", JOB_SERVER), folder.parent / "run"
    said = started.editfleet("submit", "spec.json", "--no-wait", *address, cwd=folder)
    assert said.returncode == 0, said.stderr
    first = _job(said.stderr)

    def log() -> str:
        # Before it are lines of `ray job` itself, in colours.
        return started.ray("job", "logs", first, *address).stdout.partition("entrypoint for job")[2]

    wait_for(lambda: "waiting for 2 of 2 workers" in log())
    assert re.search(r"each asks for \{'num_cpus': 1.*free are \{\}", log())
    started.add_node()
    wait_for(lambda: _lines(run) >= 2)
    assert started.ray("job", "stop", first, *address).returncode == 0
    assert "STOPPED" in _status(started, first).upper()
    ours = [line for line in log().splitlines() if line.startswith(("20", "editfleet:"))]
    assert len(ours) > 3 and not [line for line in ours if "\x1b" in line or "Traceback" in line]
    assert log().strip().endswith("and the same command resumes it"), log()
    assert not (run / "summary.json").exists()

    script = ("--", "python", "jobs/batch_edit.py", "spec.json")
    done = started.ray("job", "submit", *address, "--working-dir", ".", *script, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"run directory: {run}" in done.stdout
    assert digests(read(run)) == digests(tiny.finished(*CHANGES, requests=REQUESTS))

    again = started.editfleet("submit", "spec.json", *address, cwd=folder)
    assert again.returncode == 0 and f"run directory: {run}" in again.stdout, again.stderr


@pytest.mark.timeout(2 * PATIENCE_SECONDS)
def test_a_failing_job_fails_with_its_reason_last(started: StartedCluster, folder: Path) -> None:
    address = ("--address", JOB_SERVER)
    wrong = ("--set", "requests.path=/nowhere.json")
    said = started.editfleet("submit", "spec.json", *wrong, *address, cwd=folder)
    assert said.returncode == 2, said.stderr
    reason = said.stdout.splitlines()[-1]
    assert reason.startswith("editfleet: ") and "/nowhere.json" in reason
    assert said.stderr.splitlines()[-1].endswith("ended with exit code 2")
    status = _status(started, _job(said.stderr))
    assert "failed with exit code 2" in status
    assert status.strip().splitlines()[-1] == reason


@pytest.mark.timeout(PATIENCE_SECONDS)
def test_who_has_no_token_cannot_submit(started: StartedCluster, folder: Path) -> None:
    submission = ("submit", "spec.json", "--address", JOB_SERVER)
    for environment in ({"RAY_AUTH_TOKEN": "f" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        said = started.editfleet(*submission, cwd=folder, **environment)
        assert said.returncode == 2
        assert f"{JOB_SERVER} wants another token: export RAY_AUTH_MODE=token" in said.stderr


def _status(started: StartedCluster, job: str) -> str:
    said = started.ray("job", "status", job, "--address", JOB_SERVER)
    return said.stdout + said.stderr
