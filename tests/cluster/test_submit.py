"""Submitting: what is uploaded, what is refused, and how a job is followed."""

import asyncio
import json
import os
import random
import shlex
import signal
import threading
import time
import zipfile
from collections.abc import AsyncIterator
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipeline import signals, submitting
from pipeline.cluster.ray_engine import _require_size
from pipeline.errors import InputError, JobFailedError
from pipeline.signals import Stopped, raising_stopped
from pipeline.spec import ClusterSpec
from pipeline.submitting import Submitted, entry_point, follow, submit, warn_of_temporary
from pipeline.uploading import LIMIT_BYTES, require_uploadable, uploaded_files

ROOT = Path(__file__).parents[2]
needs_job_server = pytest.mark.skipif(
    find_spec("aiohttp") is None, reason="needs ray[default]: pip install '.[cluster]'"
)

# --- what is uploaded ---------------------------------------------------------------------------


def _folder(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_it_is_what_ray_uploads(tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    names = ["a.py", "runs", "x.bin", "data", "__pycache__", ".venv", "b c"]
    rules = ["runs/", "*.bin", "!keep.bin", "/data", "data/a.py", "**/b c", "# a remark", ""]
    generator = random.Random(3)
    for trial in range(20):
        paths = {"/".join(generator.choices(names, k=depth)) for depth in (1, 2, 2, 3, 3, 3)}
        files = {f"{path}/f{n}": "text" for n, path in enumerate(sorted(paths))}
        files |= {f"{path}/keep.bin": "text" for path in paths}
        files[".gitignore"] = "\n".join(generator.sample(rules, 3))
        files[".rayignore"] = "\n".join(generator.sample(rules, 2))
        files["data/.rayignore"] = generator.choice(rules)
        folder = _folder(tmp_path / str(trial), files)
        archive = tmp_path / f"{trial}.zip"
        create_package(
            str(folder),
            archive,
            include_gitignore=True,
            excludes=get_runtime_env_default_excludes(),
        )
        with zipfile.ZipFile(archive) as zipped:
            sent = {Path(entry.filename): entry.file_size for entry in zipped.infolist()}
            sent = {path: size for path, size in sent.items() if (folder / path).is_file()}
        assert uploaded_files(folder) == sent, (files[".gitignore"], files[".rayignore"])


def test_the_repository_travels_without_its_ballast() -> None:
    files = uploaded_files(ROOT)
    tops = {path.parts[0] for path in files}
    assert {"pipeline", "jobs", "pyproject.toml"} <= tops
    assert not {"tests", "benchmarks", ".git", ".ci", "runs"} & tops
    assert Path("pipeline/factworld/model/model.safetensors") in files
    assert Path("jobs/batch_edit.py") in files and Path("jobs/specs/quickstart.yaml") in files
    require_uploadable(ROOT, files)
    assert sum(files.values()) < LIMIT_BYTES / 4


def test_what_is_too_large_is_named_before_anything_is_sent(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"spec.yaml": "name: x", ".gitignore": "*.log", "big.log": ""})
    with open(folder / "model.bin", "wb") as file:
        file.truncate(LIMIT_BYTES - 10_000)
    with open(folder / "big.log", "wb") as file:
        file.truncate(10 * LIMIT_BYTES)
    require_uploadable(folder, uploaded_files(folder))
    with open(folder / "more.bin", "wb") as file:
        file.truncate(20_000)
    with pytest.raises(InputError, match=r"takes 100 MiB; the largest are model\.bin \(100\.0 MiB"):
        submit(folder / "spec.yaml", ["output.path=/x"], working_dir=folder)


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        ("spec.yaml", [], r"^output\.path: runs/x would lie in the job's copy"),
        ("spec.yaml", ["output.path=~/runs"], r"^output\.path: ~/runs would lie in"),
        ("spec.yaml", ["output.path=ftp://b/x"], r"output\.path: ftp:// is not known; give a dir"),
        ("spec.yaml", ["output.path=/x", "covariance.path=c"], r"^covariance\.path: c would lie"),
        ("spec.yaml", ["output.path=/x", "requests.path=data/r.json"], r"^requests\.path: data/r"),
        ("spec.yaml", ["output.path=/x", "model.path=../m"], r"^model\.path: \.\./m is not upl"),
        ("spec.yaml", ["output.path=/x", "cluster.worker=3"], r"did you mean 'workers'"),
        ("data/spec.yaml", ["output.path=/x"], r"data/spec\.yaml is not uploaded"),
        ("../m/spec.yaml", ["output.path=/x"], r"is outside the working directory"),
    ],
)
def test_what_would_fail_or_be_lost_in_the_job_is_refused(
    tmp_path: Path, spec: str, changes: list[str], message: str
) -> None:
    texts = {name: "name: x" for name in ("spec.yaml", "data/spec.yaml", "data/r.json")}
    folder = _folder(tmp_path / "w", texts | {".gitignore": "data/"})
    _folder(tmp_path / "m", {"spec.yaml": "name: x"})
    with pytest.raises(InputError, match=message):
        submit(folder / spec, changes, working_dir=folder)


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "auto", "ray://head:10001"])
def test_an_address_that_is_no_job_server_is_refused(tmp_path: Path, address: str) -> None:
    folder = _folder(tmp_path, {"spec.yaml": "name: x"})
    with pytest.raises(InputError, match=rf"^--address {address}: give the job server, as http"):
        submit(folder / "spec.yaml", ["output.path=/x"], working_dir=folder, address=address)


@pytest.mark.parametrize("has_ray_default", [True, False])
def test_nobody_answering_and_a_missing_extra_are_told_apart(
    tmp_path: Path, has_ray_default: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _folder(tmp_path, {"spec.yaml": "name: x"})
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://somewhere-else:1")
    if not has_ray_default:
        monkeypatch.setattr("ray.dashboard.modules.job.sdk.requests", None)
    said = r"http://127\.0\.0\.1:9: no job server" if has_ray_default else r"editfleet\[cluster\]"
    if has_ray_default and find_spec("aiohttp") is None:
        pytest.skip("needs ray[default]")
    with pytest.raises(InputError, match=said):
        submit(
            folder / "spec.yaml",
            ["output.path=/x"],
            working_dir=folder,
            address="http://127.0.0.1:9",
        )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "workers"),
        ({"workers": 2}, "gpus_per_worker"),
        ({"workers": 2, "gpus_per_worker": 1}, None),
    ],
)
def test_auto_on_a_cluster_that_has_no_nodes_yet_is_refused(
    settings: dict[str, Any], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would make one worker without a GPU, whatever the autoscaler could start."""
    resources = {"memory": 4e9, "CPU": 0.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    refused = pytest.raises(InputError, match=rf"^cluster\.{named}: the cluster has no processors")
    with refused if named else nullcontext():
        _require_size(ClusterSpec(**settings))
    resources["CPU"] = 2.0
    _require_size(ClusterSpec(**settings))


@pytest.mark.parametrize(("run", "is_said"), [("runs/x", True), ("/shared/x", False)])
def test_a_job_whose_run_would_be_deleted_says_so(
    run: str, is_said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_temporary(Path(run))
    assert not caplog.text  # this is no job
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    warn_of_temporary(Path(run))
    assert ("which Ray deletes" in caplog.text) == is_said


def test_the_entry_point_is_the_command_with_its_arguments() -> None:
    changes = ["model.path=it's $HOME", "method.layers=[3, 4]"]
    said = shlex.split(entry_point("a b/spec.yaml", changes, is_study=True, restart=True))
    settings = ["--set", changes[0], "--set", changes[1], "--restart"]
    assert said == ["python", "-m", "pipeline", "sequential", "a b/spec.yaml", *settings]
    plain = entry_point("spec.yaml", [], is_study=False, restart=False)
    assert plain == "python -m pipeline edit spec.yaml"


# --- following ----------------------------------------------------------------------------------


class Server:
    """A job server whose connection breaks: each entry is a log's text, or how far it gets."""

    def __init__(self, logs: list[tuple[str, bool]], **ended: Any) -> None:
        self.logs, self.ended, self.asked = logs, ended, 0

    def get_job_info(self, _id: str) -> Any:
        from ray.job_submission import JobStatus

        last = self.asked == len(self.logs) - 1
        status = JobStatus(self.ended["status"] if last else "RUNNING")
        return SimpleNamespace(**{**self.ended, "status": status})

    async def tail_job_logs(self, _id: str) -> AsyncIterator[str]:
        text, is_whole = self.logs[self.asked]
        self.asked += 1
        for start in range(0, len(text), 4):
            yield text[start : start + 4]
        if not is_whole:
            raise RuntimeError("WebSocket connection closed unexpectedly")


def _follow(server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    monkeypatch.setattr(submitting, "_RECONNECT_SECONDS", 0.0)
    pieces: list[str] = []
    code = follow(Submitted(server, "http://head", "job"), pieces.append)  # type: ignore[arg-type]
    return code, "".join(pieces)


@needs_job_server
def test_a_log_goes_on_where_its_connection_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "one\ntwo\nthree\nfour\n"
    logs = [(whole[:5], False), (whole[:4], False), (whole[:13], True), (whole, True)]
    server = Server(logs, status="SUCCEEDED", driver_exit_code=0)
    assert _follow(server, monkeypatch) == (0, whole)
    monkeypatch.setattr(submitting, "_GIVE_UP_SECONDS", -1.0)
    broken = Server([("one", False)], status="RUNNING")
    with pytest.raises(JobFailedError, match=r"the job may go on: `ray job logs --address http:"):
        _follow(broken, monkeypatch)


@needs_job_server
@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -signal.SIGKILL, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
    ],
)
def test_the_exit_code_is_the_jobs(
    status: str, driver: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server([("", True)], status=status, driver_exit_code=driver, message="no node")
    assert _follow(server, monkeypatch)[0] == code


@needs_job_server
@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_ends_the_following_and_not_the_job(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless(Server):
        async def tail_job_logs(self, _id: str) -> AsyncIterator[str]:
            yield "one"
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
            await asyncio.sleep(60)

    monkeypatch.setattr(signals, "_SECONDS_TO_END", 3600.0)  # else the tests would end, too
    begun, pieces = time.monotonic(), list[str]()
    job = Submitted(Endless([("", True)] * 2), "http://head", "job")  # type: ignore[arg-type]
    with pytest.raises(Stopped, match="the job goes on"), raising_stopped("the job goes on"):
        follow(job, pieces.append)
    assert pieces == ["one"] and time.monotonic() - begun < 30
