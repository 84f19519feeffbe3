"""One driver at a time on a run directory: a lock of the operating system, and who holds it.

The lock (flock, by `filelock`) vanishes with the process that holds it, however that ends, so a
stale one does not exist. On NFS and most parallel file systems it holds between machines; where a
mounted object store keeps locks to one machine, only drivers of one machine are kept apart.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import InputError
from pipeline.results.atomic import make_directory, write_atomically
from pipeline.results.place import COPY, LISTING, LOCK, OWNER, is_run, require_fresh

log = logging.getLogger(__name__)

# `is_held` takes the lock for a moment, and so may stand in a starting driver's way.
_PATIENCE_SECONDS = 0.5


@dataclass(frozen=True)
class Owner:
    """The driver that holds a run directory, or the last one that did and could not say goodbye."""

    host: str
    process: int
    since: str

    def __str__(self) -> str:
        age = datetime.now(UTC) - datetime.fromisoformat(self.since)
        return f"process {self.process} on {self.host}, for {_duration(int(age.total_seconds()))}"


@contextmanager
def held(path: Path, place: str | None = None) -> Iterator[None]:
    """Hold a run directory, which is made when it is missing, as its only driver.

    When no run has begun in it by the end, what this made is gone again.

    Args:
        path: the directory.
        place: what errors call the run, where that is another name than its path.

    Raises:
        InputError: another driver holds it, it holds something else than a run, or it cannot be
            made.
    """
    if not is_run(path):
        require_fresh(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    lock = FileLock(path / LOCK, thread_local=False)
    try:
        make_directory(path)
        lock.acquire(timeout=_PATIENCE_SECONDS)
    except Timeout:
        raise InputError(_busy(path, place or str(path))) from None
    except OSError as error:
        _remove(made)
        raise InputError(
            f"{path}: cannot make or lock the run directory ({error.strerror}); choose another"
            " output.path"
        ) from error
    try:
        _sign(path)
        yield
    finally:
        (path / OWNER).unlink(missing_ok=True)
        if not is_run(path):
            for name in (LISTING, COPY, LOCK):
                (path / name).unlink(missing_ok=True)
            _remove(made)
        lock.release()


def is_held(path: Path) -> bool | None:
    """Whether a driver holds the run directory now; None where this user may not ask."""
    if not (path / LOCK).exists():
        return False
    try:
        with FileLock(path / LOCK, timeout=0, thread_local=False):
            return False
    except Timeout:
        return True
    except OSError:
        return None


def read_owner(path: Path) -> Owner | None:
    """Who holds the run directory or was killed while holding it; None if nobody is recorded."""
    try:
        return parse_owner((path / OWNER).read_bytes(), path / OWNER)
    except FileNotFoundError:
        return None


def parse_owner(data: bytes, source: Path | str) -> Owner | None:
    """What a driver wrote about itself; None, and a warning, if that is not what `source` holds."""
    try:
        content = json.loads(data)
        owner = Owner(str(content["host"]), int(content["process"]), str(content["since"]))
        str(owner)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s does not say who the driver is (%s)", source, error)
        return None
    return owner


def _sign(path: Path) -> None:
    """Write down who holds the lock that has just been taken."""
    here, before = socket.gethostname(), read_owner(path)
    if before is not None and before.host != here:
        log.warning(
            "%s: the driver before, %s, did not end by itself; make sure that it runs no more if"
            " locks do not reach from there to here",
            path,
            before,
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomically(path / OWNER, json.dumps(asdict(Owner(here, os.getpid(), now))).encode())


def _busy(path: Path, place: str) -> str:
    owner = read_owner(path)
    who = "another driver" if owner is None else f"another driver ({owner})"
    return (
        f"{place}: {who} is working on this run; wait for it or end it, or choose another"
        " output.path"
    )


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # somebody else has put something into it
            folder.rmdir()


def _duration(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} s"
    minutes = seconds // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
