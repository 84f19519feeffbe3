"""Bringing what a URL holds of a run into a directory: a driver's copy, or a reader's."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from pipeline.errors import InputError, ResultsDamagedError
from pipeline.results.atomic import write_atomically
from pipeline.results.listing import Part, parse_lines, read_lines
from pipeline.results.objects import Objects
from pipeline.results.place import COPY, LISTING, MANIFEST, OWNER, PLAN, is_run
from pipeline.results.seconds import ROUNDS
from pipeline.results.timings import TIMINGS

Item = TypeVar("Item")

# Requests at once: a part takes tens of milliseconds, most of which is waiting.
_AT_ONCE = 8
BESIDE = ("summary.json", ROUNDS, TIMINGS)
"""What a driver writes beside the parts; readers go by it, and no result depends on it."""
DIRECTORIES = ("model", "editor")
"""Folders of a run that are there whole or not at all, and are no parts."""
# What manifest.json says from the beginning of a run to its end.
_LASTING = ("started", "spec_sha256", "requests", "model", "covariance")


@dataclass(frozen=True)
class CopyNote:
    """What a driver's copy says about itself, in `.copy.json`.

    Attributes:
        url: what it is the copy of.
        id: tells it from all other copies.
        is_published: whether the URL has held its run.
    """

    url: str
    id: str
    is_published: bool

    @classmethod
    def of(cls, copy: Path, url: str) -> "CopyNote":
        """What the copy says, or a new note where it is new."""
        try:
            content = json.loads((copy / COPY).read_bytes())
            return cls(str(content["url"]), str(content["id"]), bool(content["is_published"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # Without its note a copy counts as a stranger, whose claim is not taken over.
            return cls(url, uuid4().hex, False)

    def write(self, copy: Path) -> None:
        """Put it into the copy."""
        write_atomically(copy / COPY, json.dumps(vars(self)).encode())


@dataclass
class Published:
    """What is known to be at a URL.

    Attributes:
        length: bytes of the listing there, with which the copy's begins; None if there is none.
        parts: name -> part that it lists.
        owed: those of them whose object is missing there, or has another size.
        manifest: `manifest.json` there.
        files: name -> what `signature` said of the copy's file when it was there.
    """

    length: int | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    owed: set[str] = field(default_factory=set)
    manifest: bytes | None = None
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def bring_copy(objects: Objects, copy: Path, note: CopyNote) -> Published:
    """Make a driver's copy hold the run that a URL holds, as far as it lacks it.

    What the URL holds counts; a copy that begins with it and has more is kept, for it is what a
    driver had finished here when it lost its connection or was killed.

    Raises:
        InputError: the URL holds something else than a run, or no longer the run of the copy.
        StoreError: the URL cannot be read.
    """
    manifest, listing = objects.read(MANIFEST), objects.read(LISTING)
    if manifest is None:
        _begin_afresh(objects, copy, note)
        return Published()
    parts = listed_parts(listing, objects.url)
    assert listing is not None
    sizes = objects.sizes()
    is_same = _holds(copy, manifest, listing)
    if not is_same and not _is_ahead(copy, manifest, listing):
        _replace(objects, copy, manifest, listing, sizes)
        is_same = True
    # A copy that is ahead may have written one of these parts again: its own is the one to send.
    mine = read_lines(copy / LISTING)
    bring_parts(objects, copy, [part for name, part in parts.items() if mine.get(name) == part])
    files = {name: copy / name for name in sizes} if is_same else {}
    return Published(
        len(listing),
        parts,
        {name for name, part in parts.items() if sizes.get(name) != part.bytes},
        manifest,
        {
            name: signature(path)
            for name, path in files.items()
            if path.is_file() and path.stat().st_size == sizes[name]
        },
    )


def listed_parts(listing: bytes | None, url: str) -> dict[str, Part]:
    """Name -> part of the listing that was found at a URL.

    Raises:
        ResultsDamagedError: none was found, or it is not what was written.
    """
    if listing is None:
        raise ResultsDamagedError(
            f"{url}/{LISTING} is missing: the run's parts cannot be told from leftovers; restore it"
            " from a copy or run the job again at a new output.path"
        )
    return parse_lines(listing, f"{url}/{LISTING}")


def bring_parts(objects: Objects, copy: Path, parts: Iterable[Part]) -> None:
    """Fetch the parts that a copy lacks or has with another SHA-256, damaged or not.

    Raises:
        StoreError: the URL cannot be read.
    """

    def bring(part: Part) -> None:
        path = copy / part.name
        if digest(path) == part.sha256:
            return
        found = objects.read(part.name)
        if found is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, found)

    at_once(bring, parts)


def bring_files(objects: Objects, copy: Path, names: Iterable[str]) -> None:
    """Fetch files that are no parts, whatever a copy has in their place.

    Raises:
        StoreError: the URL cannot be read.
    """
    at_once(lambda name: objects.get(name, copy / name), names)


def at_once(work: Callable[[Item], Any], items: Iterable[Item]) -> None:
    """Do the work for every item, some at a time; raises what the first that failed raised."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(work, items):
            pass


def digest(path: Path) -> str | None:
    """The SHA-256 of a file; None where there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def signature(path: Path) -> tuple[int, int]:
    """What changes when a file is written again: its size and time."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _begin_afresh(objects: Objects, copy: Path, note: CopyNote) -> None:
    """Check that a run can begin at a URL, and bring the plan that was made for it."""
    url, found = objects.url, objects.sizes()
    strange = found.keys() - {OWNER, PLAN, LISTING}
    if strange:
        raise InputError(
            f"{url} holds no run, but other objects, such as {min(strange)}; choose another"
            " output.path, or move or delete them"
        )
    if is_run(copy) and note.is_published:
        raise InputError(
            f"{url} holds no run any more, and its copy on this machine does; delete {copy} to"
            f" begin anew there, or put what it holds back to {url} to go on"
        )
    bring_files(objects, copy, {PLAN} & found.keys())


def _holds(copy: Path, manifest: bytes, listing: bytes) -> bool:
    return _read(copy / MANIFEST) == manifest and _read(copy / LISTING) == listing


def _is_ahead(copy: Path, manifest: bytes, listing: bytes) -> bool:
    """Whether the copy holds what the URL does, and more that came from it."""
    mine, ours = _read(copy / MANIFEST), _read(copy / LISTING)
    if mine is None or ours is None or len(ours) <= len(listing) or not ours.startswith(listing):
        return False
    try:
        here, there = json.loads(mine), json.loads(manifest)
        return all(here[name] == there[name] for name in _LASTING)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _replace(
    objects: Objects, copy: Path, manifest: bytes, listing: bytes, sizes: dict[str, int]
) -> None:
    """Make all but the parts of a copy what the URL holds."""
    # First, so that a copy that is cut short counts as that of a run.
    write_atomically(copy / MANIFEST, manifest)
    write_atomically(copy / LISTING, listing)
    for name in BESIDE:
        (copy / name).unlink(missing_ok=True)
    bring_files(objects, copy, [name for name in (*BESIDE, PLAN) if name in sizes])
    for directory in DIRECTORIES:
        shutil.rmtree(copy / directory, ignore_errors=True)
        if _is_finished(manifest):
            # Before that it may be there in part.
            names = [name for name in sizes if name.startswith(f"{directory}/")]
            bring_files(objects, copy, names)


def _is_finished(manifest: bytes) -> bool:
    try:
        return bool(json.loads(manifest)["status"] == "finished")
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
