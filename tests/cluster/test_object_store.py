"""Whole jobs whose run is at a URL, on a server that speaks S3."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner

from pipeline import export_model, run_batch_edit, run_comparison
from pipeline.cli import app, main
from pipeline.cluster import run as run_module
from pipeline.cluster.tracing import run_trace
from pipeline.errors import InputError, JobFailedError
from pipeline.report.status import run_status
from pipeline.results import read
from tests.cluster.test_resume import CountingEngine
from tests.tiny_jobs import TinyJobs, digests

pytest.importorskip("s3fs")
ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a store that speaks S3, with the credentials for it in the environment."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        files().mkdir("tests")
        yield f"http://{host}:{port}"
    running.stop()


def files() -> Any:
    """The store as a file system."""
    import fsspec

    return fsspec.filesystem("s3", use_listings_cache=False)


@pytest.fixture
def url(server: str) -> str:
    """Where a run can begin."""
    return f"s3://tests/{uuid4().hex}/run"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache on this machine."""
    return machine(tmp_path, "here", monkeypatch)


def machine(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to another machine, which shares nothing with the others but the store."""
    cache = tmp_path / name
    monkeypatch.setenv("EDITFLEET_CACHE", str(cache))
    return cache


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the worker that runs of this test call."""
    monkeypatch.setattr(CountingEngine, "calls", [], raising=False)
    monkeypatch.setattr(run_module, "InProcessEngine", CountingEngine)
    return CountingEngine.calls


def at(tiny: TinyJobs, url: str, *changes: str) -> Any:
    """The tiny job with its run at a URL."""
    return tiny.spec(Path("unused"), f"output.path={url}", *changes)


def test_a_run_at_a_url_has_the_bits_of_a_local_one_and_every_reader_takes_the_url(
    tiny: TinyJobs, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_batch_edit(at(tiny, url, "output.save_model=true"))
    assert result.place == url and result.path.is_relative_to(tmp_path / "here")
    machine(tmp_path, "elsewhere", monkeypatch)
    found = read(url)
    found.verify()
    assert digests(found) == digests(tiny.finished())
    assert found.manifest["spec"]["output"]["path"] == url
    names = {name.removeprefix(f"{url[5:]}/") for name in files().find(url)}
    local = tiny.finished().path
    here = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    model = {name for name in names if name.startswith("model/")}
    assert "model/config.json" in model and names - model == here - {".lock"}

    assert run_status(url).state == "finished" and run_status(url).place == url
    assert all(phase.left == 0 for phase in run_status(url).phases)
    said = CliRunner().invoke(app, ["status", url, "--verify"])
    assert said.exit_code == 0 and f"{url}: finished" in said.output
    for command in (["summary", url], ["report", url], ["timeline", url, str(tmp_path / "t.json")]):
        said = CliRunner().invoke(app, command)
        assert said.exit_code == 0, said.output
    assert b"<html" in files().cat_file(f"{url}/report.html")
    assert files().exists(f"{url}/report/scores.svg")
    export_model(url, tmp_path / "exported")
    assert (tmp_path / "exported" / "config.json").is_file()


def _cut(url: str, lines: int) -> None:
    """What is at a URL when its driver's machine is lost after so many parts."""
    store = files()
    listing = store.cat_file(f"{url}/manifest.jsonl").splitlines(keepends=True)
    store.pipe_file(f"{url}/manifest.jsonl", b"".join(listing[:lines]))
    for line in listing[lines + 1 :]:  # one was sent and not listed
        store.rm_file(f"{url}/{json.loads(line)['name']}")
    store.rm_file(f"{url}/summary.json")
    manifest = json.loads(store.cat_file(f"{url}/manifest.json"))
    store.pipe_file(f"{url}/manifest.json", json.dumps({**manifest, "status": "running"}).encode())


@pytest.mark.parametrize("lines", [0, 3, 7])
def test_another_machine_goes_on_where_the_url_is(
    tiny: TinyJobs,
    url: str,
    lines: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: list[str],
) -> None:
    run_batch_edit(at(tiny, url))
    _cut(url, lines)
    all_calls = list(calls)
    calls.clear()
    machine(tmp_path, "elsewhere", monkeypatch)
    listed = [json.loads(line) for line in files().cat_file(f"{url}/manifest.jsonl").splitlines()]
    values = sum(part["kind"] == "values" for part in listed)
    baseline = sum(part["kind"] == "metrics" for part in listed)
    run_batch_edit(at(tiny, url))
    assert calls.count("values") == all_calls.count("values") - values
    assert calls.count("evaluate") == all_calls.count("evaluate") - baseline
    assert digests(read(url)) == digests(tiny.finished())
    # The first machine, whose copy has gone another way since, takes the URL's word.
    machine(tmp_path, "here", monkeypatch)
    calls.clear()
    run_batch_edit(at(tiny, url))
    assert calls == []


def test_a_damaged_object_is_named_and_computed_again(
    tiny: TinyJobs, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    run_batch_edit(at(tiny, url))
    [first, *_] = [part for part in read(url)._store.parts("values")]
    data = bytearray(files().cat_file(f"{url}/{first.name}"))
    data[len(data) // 2] ^= 4
    files().pipe_file(f"{url}/{first.name}", bytes(data))
    machine(tmp_path, "elsewhere", monkeypatch)
    said = CliRunner().invoke(app, ["status", url, "--verify"])
    assert said.exit_code == 1 and f"damaged: {url}/{first.name} has SHA-256" in said.output
    run_batch_edit(at(tiny, url))
    assert f"{url}/{first.name} has SHA-256" in caplog.text
    machine(tmp_path, "third", monkeypatch)
    read(url).verify()
    assert digests(read(url)) == digests(tiny.finished())


def test_a_comparison_a_trace_and_a_restart_at_urls(
    tiny: TinyJobs, url: str, tmp_path: Path
) -> None:
    changes = ["rounds.size=6", "compare.methods=[{name: memit}, {name: memit, label: other}]"]
    results = run_comparison(at(tiny, url, *changes))
    assert [result.place for result in results] == [f"{url}/memit", f"{url}/other"]
    assert digests(read(f"{url}/memit")) == digests(read(f"{url}/other"))
    said = CliRunner().invoke(
        app, ["report", f"{url}/memit", f"{url}/other", "--output", f"{url}/compared"]
    )
    assert said.exit_code == 0 and files().exists(f"{url}/compared/report.html"), said.output
    traced = run_trace(at(tiny, f"{url}-trace"))
    assert read(traced.place).trace().equals(read(traced.path).trace())
    again = run_trace(at(tiny, f"{url}-trace"), restart=True)
    assert again.place == f"{url}-trace-2"


def _exit(capsys: Any, *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0), capsys.readouterr().err


def test_what_cannot_be_is_said_in_one_line_before_anything_is_written(
    tiny: TinyJobs,
    url: str,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    spec = tiny.spec_file(tmp_path / "spec.yaml", tiny.settings(Path("unused")))

    def refused(place: str) -> str:
        code, said = _exit(capsys, "edit", str(spec), "--set", f"output.path={place}")
        [line] = said.strip().splitlines()
        assert code == 2 and line.startswith("editfleet: "), said
        assert not [path for path in cache.rglob("*") if path.is_file()]
        return line

    assert "s3://nowhere/x/run" in refused("s3://nowhere/x/run")
    assert "does not exist" in refused("s3://nowhere/x/run")
    assert "output.path: ftp:// is not known" in refused("ftp://host/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert "gs:// needs gcsfs; install it: pip install 'editfleet[gs]'" in refused("gs://b/run")
    code, said = _exit(capsys, "status", "s3://nowhere/x/run")
    assert code == 2 and "is not a run: it has no manifest.json" in said
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    assert "Unable to locate credentials" in refused(url)
    s3fs.S3FileSystem.clear_instance_cache()


def test_two_drivers(tiny: TinyJobs, url: str) -> None:
    owner = {"host": "far", "process": 7, "since": "2026-01-01T00:00:00+00:00", "copy": "x"}
    files().pipe_file(f"{url}/.driver.json", json.dumps(owner).encode())
    with pytest.raises(InputError, match=r"another driver \(process 7 on far, for .*delete the"):
        run_batch_edit(at(tiny, url))
    assert files().find(url) == [f"{url[5:]}/.driver.json"]


def test_a_store_that_is_lost_ends_the_job_and_its_run_is_not_brought_back(
    tiny: TinyJobs, url: str, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """The bucket is deleted while values are searched, and made again."""
    bucket = f"lost-{uuid4().hex}"
    files().mkdir(bucket)
    place = f"s3://{bucket}/run"
    submit = CountingEngine.submit

    def losing(self: Any, worker: int, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "values" and calls.count("values") == 2:
            files().rm(bucket, recursive=True)
        return submit(self, worker, method, *args, **kwargs)

    monkeypatch.setattr(CountingEngine, "submit", losing)
    with pytest.raises(JobFailedError, match=f"{place}/.*; .* kept in .*, and the same command"):
        run_batch_edit(at(tiny, place))
    monkeypatch.setattr(CountingEngine, "submit", submit)
    files().mkdir(bucket)
    with pytest.raises(InputError, match="holds no run any more, and its copy on this machine"):
        run_batch_edit(at(tiny, place))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 6, 9])
def test_a_driver_that_is_killed_is_gone_on_with_elsewhere(
    tiny: TinyJobs, url: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny.settings(Path("unused"))
    settings["output"]["path"] = url
    spec = tiny.spec_file(tmp_path / "spec.yaml", settings)
    command = [sys.executable, "-m", "pipeline", "edit", str(spec)]
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    store = files()
    until = time.monotonic() + 240
    while time.monotonic() < until and driver.poll() is None:
        listing = f"{url}/manifest.jsonl"
        if store.exists(listing) and store.cat_file(listing).count(b"\n") >= parts:
            break
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    read(url).verify()
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(InputError, match="another driver"):
        run_batch_edit(at(tiny, url))
    store.rm_file(f"{url}/.driver.json")
    machine(tmp_path, "elsewhere", monkeypatch)
    run_batch_edit(at(tiny, url))
    assert digests(read(url)) == digests(tiny.finished())
