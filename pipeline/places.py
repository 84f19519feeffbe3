"""Where runs are: in a directory, or at a URL of an object store with a copy on this machine."""

import hashlib
import os
from pathlib import Path

from pipeline.errors import InputError

OBJECT_STORES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs"), "memory": ("fsspec", "")}
"""Protocol -> the package that speaks it, and the extra of editfleet that installs it.

Each writes an object whole or not at all and can refuse to write over one (docs/cluster.md).
`memory` ends with its process; it is there for tests and notebooks."""


def checked_place(text: str) -> str:
    """A directory as it was given, a `file://` URL as its path, another URL without a last slash.

    Raises:
        ValueError: the URL is of no object store that is known, or names no place in a bucket.
    """
    protocol, mark, rest = text.partition("://")
    if not mark:
        return text
    if protocol == "file":
        if not rest.startswith("/"):
            raise ValueError("names another machine; write file:///PATH, or the path alone")
        return rest
    if protocol not in OBJECT_STORES:
        raise ValueError(
            f"{protocol}:// is not known; give a directory, s3://BUCKET/PATH or gs://BUCKET/PATH"
        )
    parts = rest.rstrip("/").split("/")
    if len(parts) < 2 or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(f"names no place in a bucket; write {protocol}://BUCKET/PATH")
    return f"{protocol}://{'/'.join(parts)}"


def located(run: str | Path) -> Path | str:
    """Where a run is that a command or a caller names: a directory's path, or a URL as text.

    Raises:
        InputError: the URL is none that is known.
    """
    if isinstance(run, Path):
        return run
    try:
        place = checked_place(run)
    except ValueError as error:
        raise InputError(f"{run}: {error}") from error
    return place if is_url(place) else Path(place)


def is_url(place: str) -> bool:
    """Whether a checked place is a URL."""
    return "://" in place


def below(place: str, name: str) -> str:
    """The place of that name inside another."""
    return f"{place}/{name}" if is_url(place) else str(Path(place) / name)


def cache_directory() -> Path:
    """`$EDITFLEET_CACHE`, else `$XDG_CACHE_HOME/editfleet`, else `~/.cache/editfleet`."""
    own, shared = os.environ.get("EDITFLEET_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return (Path(own) if own else Path(shared or "~/.cache") / "editfleet").expanduser()


def copy_directory(url: str, user: str, root: str | None = None) -> Path:
    """The directory on this machine for a copy of what is at a URL; its last name is the URL's.

    Args:
        url: a checked URL.
        user: whose copy; a driver and those who only read have one each.
        root: below which directory; null is the user's cache.
    """
    base = cache_directory() if root is None else Path(root)
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    return base / "runs" / key / user / url.rpartition("/")[2]
