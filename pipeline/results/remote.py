"""Reading a run where it is: a directory, or a URL whose parts are fetched when they are read.

What is fetched is kept in the user's cache, checked by its SHA-256, and fetched once. A driver's
copy is another (`pipeline.results.mirror`), so that readers never stand in its way.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from pipeline.errors import InputError
from pipeline.places import copy_directory, located
from pipeline.results.atomic import make_directory
from pipeline.results.claim import claimed_by
from pipeline.results.copying import BESIDE, bring_files, bring_parts, listed_parts
from pipeline.results.harness import FOLDER
from pipeline.results.listing import Part
from pipeline.results.lock import Owner, is_held, read_owner
from pipeline.results.manifest_file import parse_manifest
from pipeline.results.objects import Objects, refusing
from pipeline.results.place import (
    LISTING,
    LOCK,
    MANIFEST,
    OWNER,
    PLAN,
    TRACKED,
    is_run,
    next_free,
    require_fresh,
)
from pipeline.results.store import RunStore

_BESIDE = (*BESIDE, PLAN, TRACKED, "report.html")


def open_run(run: str | Path, *, beside: bool = True) -> RunStore:
    """Open a run for reading, in a directory or at a URL.

    Args:
        run: the directory or the URL.
        beside: of a URL, also fetch the files that are no parts, such as summary.json.

    Raises:
        InputError: there is no run, or it cannot be read.
        ResultsDamagedError: a manifest is damaged.
    """
    place = located(run)
    return RunStore.open(place) if isinstance(place, Path) else _RemoteRun.of(place, beside)


def begun_at(place: str | Path) -> bool:
    """Whether a run has begun in a directory or at a URL.

    Raises:
        InputError: the URL cannot be read.
    """
    found = located(place)
    if isinstance(found, Path):
        return is_run(found)
    with refusing():
        return Objects(found).read(MANIFEST) is not None


def next_free_place(place: str) -> str:
    """The first of PLACE, PLACE-2, PLACE-3, ... where there is nothing yet.

    Raises:
        InputError: the URL cannot be read.
    """
    found = located(place)
    if isinstance(found, Path):
        return str(next_free(found))
    number, free = 1, found
    with refusing():
        while Objects(free).sizes():
            number += 1
            free = f"{found}-{number}"
    return free


def require_free(place: str | Path) -> None:
    """Check that a run can begin in a directory or at a URL, where a plan may be already.

    Raises:
        InputError: it holds something else, or cannot be read.
    """
    found = located(place)
    if isinstance(found, Path):
        require_fresh(found)
        return
    with refusing():
        if strange := Objects(found).sizes().keys() - {PLAN, OWNER, LISTING}:
            raise InputError(
                f"{place} is not empty ({min(strange)}); choose another output.path, or move or"
                " delete what is there"
            )


def driver_of(run: Path | str) -> tuple[bool | None, Owner | None]:
    """Whether a driver holds a run, and which, or which one did last if it was killed.

    At a URL a driver that was killed leaves its claim, so that None is returned for the first where
    there is one: it cannot be told.

    Raises:
        InputError: the URL cannot be read.
    """
    place = located(run)
    if isinstance(place, Path):
        return is_held(place), read_owner(place)
    with refusing():
        found = Objects(place).read(OWNER)
    return (False if found is None else None), claimed_by(found, place)


@contextmanager
def writing_into(place: str | Path) -> Iterator[Path]:
    """A directory to write files of people's into: the place itself, or sent to it at the end.

    Raises:
        InputError: the URL cannot be written.
    """
    found = located(place)
    if isinstance(found, Path):
        yield found
        return
    with refusing():
        objects = Objects(found)
    with tempfile.TemporaryDirectory(prefix="editfleet-") as folder:
        directory = Path(folder)
        yield directory
        files = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
        with refusing():
            # A page after its figures.
            for path in sorted(files, key=lambda path: (-len(path.parts), path)):
                objects.put(directory / path, path.as_posix())


class _RemoteRun(RunStore):
    """A run at a URL, in a reader's copy of it."""

    objects: Objects

    @classmethod
    def of(cls, url: str, beside: bool) -> "_RemoteRun":
        """Open the run at a checked URL."""
        copy = copy_directory(url, "reader")
        with refusing():
            objects = Objects(url)
            manifest, listing = objects.read(MANIFEST), objects.read(LISTING)
            if manifest is None:
                raise InputError(f"{url} is not a run: it has no {MANIFEST}")
            content = parse_manifest(manifest, f"{url}/{MANIFEST}")
            parts = listed_parts(listing, url)
            with _alone(copy):
                if beside:
                    _bring_beside(objects, copy)
        opened = cls(copy, content, parts, url)
        opened.objects = objects
        return opened

    def bring(self, parts: Sequence[Part]) -> None:
        """Fetch the files of parts that the copy lacks.

        Raises:
            InputError: the URL cannot be read.
        """
        with refusing(), _alone(self.path):
            bring_parts(self.objects, self.path, parts)

    @property
    def holds_model(self) -> bool:
        """Whether the edited model is at the URL, whole; it is not fetched."""
        if self.manifest.get("status") != "finished":
            return False
        with refusing():
            return any(name.startswith("model/") for name in self.objects.sizes())


def _bring_beside(objects: Objects, copy: Path) -> None:
    """Fetch anew what is no part, for nothing tells whether the copy's is of now."""
    sizes = objects.sizes()
    wanted = {name for name in sizes if name in _BESIDE or name.startswith(f"{FOLDER}/")}
    kept = [*(copy / FOLDER).glob("*"), *(copy / name for name in _BESIDE)]
    for path in kept:
        if path.relative_to(copy).as_posix() not in wanted:
            path.unlink(missing_ok=True)
    bring_files(objects, copy, wanted)


@contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """Keep other readers on this machine from writing into the copy."""
    make_directory(copy)
    with FileLock(copy / LOCK):
        yield
