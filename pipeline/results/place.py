"""The names in a run directory, and where a run may begin."""

from pathlib import Path

from pipeline.errors import InputError

MANIFEST = "manifest.json"
LISTING = "manifest.jsonl"
LOCK = ".lock"
OWNER = ".driver.json"
COPY = ".copy.json"
"""Says which URL a directory is the copy of."""
TRACKED = "trackers.json"
"""Tracker -> the run's id there."""
PLAN = "plan.json"
"""What a job was estimated to cost; it may be there before the run."""

_LEFT_BY_A_START = {f".{MANIFEST}.tmp", f".{OWNER}.tmp", f".{PLAN}.tmp"}
_LEFT_BY_A_START |= {f".{COPY}.tmp", COPY, LOCK, OWNER, PLAN}


def is_run(path: Path) -> bool:
    """Whether a run has begun in a directory."""
    try:
        return (path / MANIFEST).is_file()
    except OSError:  # a name that is too long
        return False


def require_fresh(path: Path) -> None:
    """Check that a run can begin in a directory, which may be absent.

    Raises:
        InputError: it holds something already, or is no directory.
    """
    if not path.exists():
        return
    wrong = None if path.is_dir() else "is a file"
    if wrong is None and not _is_fresh(path):
        wrong = "is not empty"
    if wrong:
        raise InputError(
            f"{path} {wrong}; choose another output.path, or move or delete what is there"
        )


def next_free(path: Path) -> Path:
    """The first of PATH, PATH-2, PATH-3, ... that is not there yet."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _is_fresh(path: Path) -> bool:
    """Whether the directory is empty but for a plan and what an interrupted start leaves."""
    entries = {entry.name: entry for entry in path.iterdir()}
    for name in _LEFT_BY_A_START:
        entries.pop(name, None)
    listing = entries.pop(LISTING, None)
    return not entries and (listing is None or listing.stat().st_size == 0)
