"""One driver at a time, and nothing left where none has begun."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.results import RunStore
from pipeline.results.lock import held, is_held, read_owner

ROOT = Path(__file__).parents[2]


def test_a_lock_leaves_nothing_where_no_run_begins(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "b", tmp_path / "c"):
        with held(path):
            assert path.is_dir()
            with pytest.raises(InputError, match="another driver"), held(path):
                pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_run_s_lock_stays_and_its_owner_goes(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert is_held(path) is False and read_owner(path) is None
    with held(path):
        RunStore.create(path, {})
        owner = read_owner(path)
        assert owner is not None and is_held(path)
        assert (owner.host, owner.process) == (socket.gethostname(), os.getpid())
    assert {entry.name for entry in path.iterdir()} == {".lock", "manifest.json", "manifest.jsonl"}
    assert is_held(path) is False and read_owner(path) is None


def test_a_lock_ends_with_its_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunStore.create(tmp_path, {})
    code = (
        "import os, sys; from pathlib import Path; from pipeline.results.lock import held\n"
        "with held(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert killed.returncode == -9
    owner = read_owner(tmp_path)
    assert owner is not None and is_held(tmp_path) is False
    with held(tmp_path):
        assert caplog.text == "", "it ran on this machine, where locks are sure"
    (tmp_path / ".driver.json").write_text(
        '{"host": "elsewhere", "process": 7, "since": "2026-01-01T00:00:00+00:00"}'
    )
    with caplog.at_level(logging.WARNING), held(tmp_path):
        assert "process 7 on elsewhere, for" in caplog.text and "did not end" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"host": 1, "process": "x", "since": "no"}'])
def test_an_owner_that_cannot_be_read_is_none(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".driver.json").write_text(content)
    assert read_owner(tmp_path) is None and "does not say who" in caplog.text


def test_places_that_cannot_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for path, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot make or lock the run directory"),
        (tmp_path / "full", "is not empty; choose another output.path"),
    ):
        with pytest.raises(InputError, match=said), held(path):
            pass
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["mine.txt"]
