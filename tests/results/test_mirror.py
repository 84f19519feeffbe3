"""A run kept at a URL: sound there at every moment, whatever breaks, and taken up from there."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import EditfleetError, InputError, JobFailedError, ResultsDamagedError
from pipeline.places import checked_place, copy_directory
from pipeline.results import RunStore, mirror, read
from pipeline.results.driving import driving
from pipeline.results.place import OWNER, is_run
from pipeline.results.remote import next_free_place, open_run
from tests.fuzzing import fuzz

MANIFEST = {
    "started": "2026-01-01T00:00:00+00:00",
    "spec_sha256": "0" * 64,
    "requests": {"count": 1},
    "model": {"path": "m"},
    "covariance": {},
    "status": "running",
}


@dataclass
class Store:
    """An object store in memory: what it holds, and what breaks it."""

    url: str
    requests: int = 0
    breaks_after: int | None = None
    error: type[Exception] = PermissionError
    is_watched: bool = False
    looks: list[dict[str, str]] = field(default_factory=list)

    @property
    def objects(self) -> dict[str, bytes]:
        root = f"/{self.url.partition('://')[2]}/"
        return {
            path.removeprefix(root): file.getvalue()
            for path, file in MemoryFileSystem.store.items()
            if path.startswith(root)
        }

    def put(self, name: str, data: bytes) -> None:
        """As somebody else does, who is not watched."""
        path = f"/{self.url.partition('://')[2]}/{name}"
        MemoryFileSystem.store[path] = MemoryFile(MemoryFileSystem(), path, data)

    def remove(self, *names: str) -> None:
        for name in names or list(self.objects):
            del MemoryFileSystem.store[f"/{self.url.partition('://')[2]}/{name}"]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    """A store that counts what changes it, and can refuse to be changed from some request on."""
    monkeypatch.setenv("EDITFLEET_CACHE", str(tmp_path / "cache"))
    made = Store(f"memory://bucket/{uuid4().hex}/run")

    def counted(name: str) -> None:
        original = getattr(MemoryFileSystem, name)

        def method(self: MemoryFileSystem, *args: Any, **kwargs: Any) -> Any:
            made.requests += 1
            if made.breaks_after is not None and made.requests > made.breaks_after:
                raise made.error("the store is broken")
            result = original(self, *args, **kwargs)
            if made.is_watched and "manifest.json" in made.objects:
                made.looks.append(_contents(made.url))
            return result

        monkeypatch.setattr(MemoryFileSystem, name, method)

    for name in ("pipe_file", "put_file", "rm_file"):
        counted(name)
    yield made
    made.breaks_after = None
    made.remove()


def _contents(url: str) -> dict[str, str]:
    """Part -> its text, of the run as it is at a URL; checks that every part is whole."""
    found = open_run(url, beside=False)
    found.verify()
    return {
        part.name: found.read_parts("edits", part.round, [part.shard])["case_id"][0].as_py()
        for part in found.parts("edits")
        if part.shard is not None
    }


def _write(run: RunStore, shard: int, text: str) -> str:
    rows = [{"round": 0, "case_id": text, "status": "applied"}]
    return run.write_part("edits", rows, round=0, shard=shard, weight_version=0)


def _open(url: str, copy: Path) -> RunStore:
    if is_run(copy):
        return RunStore.open(copy, url)
    return RunStore.create(copy, MANIFEST, url)


# --- what the URL holds --------------------------------------------------------------------------


def test_the_url_holds_what_the_copy_does(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    with driving(copy, store.url) as kept:
        assert kept is not None
        run = _open(store.url, copy)
        kept.follow(run)
        for shard in range(5):
            _write(run, shard, f"first {shard}")
        _write(run, 2, "second")
        run.withdraw(run.parts("edits")[4])
        (copy / "model").mkdir()
        (copy / "model" / "config.json").write_text("{}")
        run.write_json("summary.json", {"name": "x"})
        run.update_manifest(status="finished")
    assert sorted(_contents(store.url).values()) == ["first 0", "first 1", "first 3", "second"]
    visible = [path for path in copy.rglob("*") if path.is_file() and path.name[0] != "."]
    files = {path.relative_to(copy).as_posix(): path.read_bytes() for path in visible}
    files.pop("edits/round-00000-shard-00004.parquet")  # withdrawn; it counts for nothing
    assert store.objects == files
    assert read(store.url).summary == {"name": "x"} and open_run(store.url).holds_model


def test_at_every_moment_the_url_holds_a_sound_run(store: Store, tmp_path: Path) -> None:
    store.is_watched = True
    with driving(tmp_path / "copy", store.url) as kept:
        assert kept is not None
        run = _open(store.url, tmp_path / "copy")
        kept.follow(run)
        for turn in range(3):
            for shard in range(4):
                _write(run, shard, f"{turn} {shard}")
    assert len(store.looks) > 4
    # Never a text of one turn under the name of another shard; each is as it was written.
    assert all(text[-1] == name[-9] for look in store.looks for name, text in look.items())


@fuzz(quick=10, thorough=500)
@given(data=st.data())
def test_wherever_the_store_breaks_another_machine_goes_on_from_what_it_lists(
    store: Store, tmp_path: Path, data: st.DataObject
) -> None:
    """Some machines in turn, each with a copy of its own that it may come back to."""
    store.breaks_after = None
    store.remove()
    copies = [tmp_path / uuid4().hex for _ in range(2)]
    written: set[tuple[int, str]] = set()
    for turn in range(data.draw(st.integers(1, 4), "turns")):
        copy = copies[data.draw(st.integers(0, 1), "machine")]
        shards = data.draw(st.lists(st.integers(0, 3), max_size=4), "shards")
        store.requests = 0
        store.breaks_after = data.draw(st.none() | st.integers(0, 12), "breaks after")
        before = _contents(store.url) if "manifest.json" in store.objects else {}
        try:
            with driving(copy, store.url) as kept:
                assert kept is not None
                run = _open(store.url, copy)
                listed = {part.name for part in run.parts()}
                assert before.keys() <= listed
                run.verify()
                kept.follow(run)
                for shard in shards:
                    written.add((shard, f"{turn} {shard}"))
                    _write(run, shard, f"{turn} {shard}")
        except (EditfleetError, OSError):
            assert store.breaks_after is not None
        store.breaks_after = None
        # Its machine is gone for good.
        if OWNER in store.objects:
            store.remove(OWNER)
        if "manifest.json" in store.objects:
            now = {(int(name[-9]), text) for name, text in _contents(store.url).items()}
            assert now <= written


# --- taken up ------------------------------------------------------------------------------------


def _run_once(store: Store, copy: Path, *texts: str) -> RunStore:
    with driving(copy, store.url) as kept:
        assert kept is not None
        run = _open(store.url, copy)
        kept.follow(run)
        for shard, text in enumerate(texts):
            if not run.has_part("edits", 0, shard):
                _write(run, shard, text)
    return run


def test_what_was_finished_without_a_connection_is_sent_later(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    _run_once(store, copy, "a")
    said = r"broken; all that was finished is kept in .*copy"
    with pytest.raises(JobFailedError, match=said), driving(copy, store.url):
        _write(RunStore.open(copy, store.url), 1, "b")
        store.breaks_after = store.requests
    store.breaks_after = None
    assert list(_contents(store.url).values()) == ["a"]
    assert "delete it before another machine goes on" in caplog.text
    # The claim that could not be deleted is this copy's own.
    run = _run_once(store, copy, "not", "again", "c")
    assert run.read_parts("edits")["case_id"].to_pylist() == ["a", "b", "c"]
    assert list(_contents(store.url).values()) == ["a", "b", "c"]


def test_a_part_that_was_written_again_without_a_connection_is_sent_later(
    store: Store, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    run = _run_once(store, copy, "a", "b")
    _write(run, 1, "changed")
    with driving(copy, store.url) as kept:
        assert kept is not None
        kept.follow(RunStore.open(copy, store.url))
    assert list(_contents(store.url).values()) == ["a", "changed"]
    assert run.read_parts("edits")["case_id"].to_pylist() == ["a", "changed"]


def test_an_error_in_the_background_ends_the_job(store: Store, tmp_path: Path) -> None:
    def write(count: int) -> None:
        store.breaks_after = None
        with driving(tmp_path / "copy", store.url) as kept:
            assert kept is not None
            run = _open(store.url, tmp_path / "copy")
            kept.follow(run)
            store.breaks_after = store.requests
            for _ in range(count):
                _write(run, 0, "a")

    # At its end, or at one of its next parts.
    with pytest.raises(JobFailedError, match=r"cannot be written: the store is broken; all that"):
        write(1)
    with pytest.raises(OSError, match="the store is broken"):
        write(10_000)


def test_a_store_that_is_away_for_a_while_is_waited_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.error = ConnectionError
    with driving(tmp_path / "copy", store.url) as kept:
        assert kept is not None
        run = _open(store.url, tmp_path / "copy")
        kept.follow(run)
        store.breaks_after = store.requests
        warn = mirror.log.warning

        def mended(*args: Any) -> None:
            warn(*args)
            store.breaks_after = None

        monkeypatch.setattr(mirror.log, "warning", mended)
        _write(run, 0, "a")
    assert "the store is broken; trying again in 1 s" in caplog.text
    assert list(_contents(store.url).values()) == ["a"]


def test_a_run_that_was_deleted_at_its_url_is_not_brought_back(
    store: Store, tmp_path: Path
) -> None:
    _run_once(store, tmp_path / "copy", "a")
    store.remove()
    with pytest.raises(InputError, match=r"holds no run any more.*delete .*copy to begin anew"):
        _run_once(store, tmp_path / "copy", "a")
    assert store.objects == {}
    _run_once(store, tmp_path / "other", "b")
    # Another run by then: what the copy has of the old one does not go into it.
    assert _run_once(store, tmp_path / "copy", "x").read_parts("edits")["case_id"][0].as_py() == "b"


def test_what_is_damaged_at_the_url_is_named(store: Store, tmp_path: Path) -> None:
    _run_once(store, tmp_path / "copy", "a", "b")
    name = "edits/round-00000-shard-00001.parquet"
    store.put(name, store.objects[name][:-1])
    with pytest.raises(ResultsDamagedError, match=rf"^{store.url}/{name} has \d+ bytes, expected"):
        read(store.url).verify()
    store.put(name, bytes([*store.objects[name], 7]))
    with pytest.raises(ResultsDamagedError, match=rf"^{store.url}/{name} has SHA-256"):
        read(store.url).edits()
    with driving(tmp_path / "elsewhere", store.url):
        found = RunStore.open(tmp_path / "elsewhere", store.url).damaged()
    assert [str(error).partition(" has ")[0] for _, error in found] == [f"{store.url}/{name}"]
    store.remove(name)
    with pytest.raises(ResultsDamagedError, match=rf"^{store.url}/{name} is missing"):
        read(store.url).verify()
    # The first machine still has it, and puts it back.
    _run_once(store, tmp_path / "copy")
    assert list(_contents(store.url).values()) == ["a", "b"]
    store.remove("manifest.jsonl")
    with pytest.raises(ResultsDamagedError, match=rf"^{store.url}/manifest\.jsonl is missing"):
        read(store.url)


def test_a_damaged_copy_is_not_sent(store: Store, tmp_path: Path) -> None:
    said = r"shard-00000\.parquet is damaged, and is not sent"
    with pytest.raises(JobFailedError, match=said), driving(tmp_path / "copy", store.url):
        run = _open(store.url, tmp_path / "copy")
        name = _write(run, 0, "a")
        (tmp_path / "copy" / name).write_bytes(b"x")


# --- whose it is ---------------------------------------------------------------------------------


def test_two_drivers_are_kept_apart(store: Store, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    said = rf"^{store.url}: another driver \(process \d+ on "
    with driving(one, store.url):
        with (
            pytest.raises(InputError, match=rf"{said}.*delete the object"),
            driving(two, store.url),
        ):
            pass
        assert not two.exists()
        with pytest.raises(InputError, match=said), driving(one, store.url):
            pass
        assert OWNER in store.objects
    assert store.objects == {} and not one.exists()


def test_a_driver_whose_claim_was_deleted_and_taken_writes_no_more(
    store: Store, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    said = "the claim of this driver was deleted"
    with pytest.raises(JobFailedError, match=said), driving(one, store.url) as kept:
        assert kept is not None and kept.claim is not None
        run = _open(store.url, one)
        kept.follow(run)
        store.remove(OWNER)
        with driving(two, store.url):
            _write(run, 0, "a")
            kept.close()
    assert _contents(store.url) == {} and OWNER not in store.objects


def test_a_claim_of_a_driver_that_was_killed_with_this_copy_is_taken_over(
    store: Store, tmp_path: Path
) -> None:
    _run_once(store, tmp_path / "copy", "a")
    note = json.loads((tmp_path / "copy" / ".copy.json").read_text())
    owner = {"host": "gone", "process": 1, "since": "2026-01-01T00:00:00+00:00"}
    store.put(OWNER, json.dumps({**owner, "copy": note["id"]}).encode())
    _run_once(store, tmp_path / "copy", "a", "b")
    store.put(OWNER, json.dumps({**owner, "copy": "another"}).encode())
    with pytest.raises(InputError, match="process 1 on gone, for"):
        _run_once(store, tmp_path / "copy", "a", "b")
    store.put(OWNER, b"{")
    with pytest.raises(InputError, match=r"another driver \(unknown\)"):
        _run_once(store, tmp_path / "copy", "a", "b")


# --- places --------------------------------------------------------------------------------------


def test_a_url_that_holds_something_else_is_refused(store: Store, tmp_path: Path) -> None:
    store.put("notes.txt", b"x")
    with pytest.raises(InputError, match=r"holds no run, but other objects, such as notes\.txt"):
        _run_once(store, tmp_path / "copy", "a")
    assert set(store.objects) == {"notes.txt"} and not (tmp_path / "copy").exists()
    assert next_free_place(store.url) == f"{store.url}-2"
    with pytest.raises(InputError, match=r"is not a run: it has no manifest\.json"):
        read(store.url)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("/a/b", "/a/b"),
        ("runs/x", "runs/x"),
        ("file:///a/b", "/a/b"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("gs://bucket/a", "gs://bucket/a"),
    ],
)
def test_places(text: str, place: str) -> None:
    assert checked_place(text) == place


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://a/b", r"ftp:// is not known; give a directory, s3://BUCKET/PATH or gs://"),
        ("://a/b", "is not known"),
        ("s3://bucket", "names no place in a bucket; write s3://BUCKET/PATH"),
        ("s3://", "names no place"),
        ("s3://bucket/a//b", "names no place"),
        ("gs://bucket/../b", "names no place"),
        ("file://host/a", "names another machine; write file:///PATH"),
    ],
)
def test_places_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked_place(text)
    with pytest.raises(InputError, match=said):
        read(text)


@fuzz(100, 3000)
@given(st.text(max_size=40), st.sampled_from(["s3://", "gs://", "memory://", ""]))
def test_any_place_is_told_or_refused(text: str, start: str) -> None:
    try:
        place = checked_place(start + text)
    except ValueError:
        return
    assert checked_place(place) == place
    if start:
        assert copy_directory(place, "driver", "/r").is_relative_to("/r/runs")
        assert copy_directory(place, "driver", "/r").name == place.rpartition("/")[2]


def test_nothing_of_a_name_leads_out_of_the_copy(store: Store, tmp_path: Path) -> None:
    _run_once(store, tmp_path / "copy", "a")
    store.put("harness/../../outside", b"x")
    store.put("model/../../../outside", b"x")
    read(store.url)
    _run_once(store, tmp_path / "other")
    assert not list(tmp_path.rglob("outside"))
