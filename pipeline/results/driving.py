"""Being the only driver of a run, wherever it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.results.claim import Claim
from pipeline.results.copying import CopyNote, bring_copy
from pipeline.results.lock import held
from pipeline.results.mirror import Mirror
from pipeline.results.objects import Objects, refusing


@contextmanager
def driving(path: Path, url: str | None) -> Iterator[Mirror | None]:
    """Be the only driver of a run: in a directory, or at a URL with its copy in the directory.

    Args:
        path: the run directory, or the copy.
        url: a checked URL; None where the run is in the directory itself.

    Yields:
        What keeps the URL as the copy is; None where there is no URL.

    Raises:
        InputError: another driver has the run, or its place holds something else or cannot be
            written.
        JobFailedError: in the place of a job's success, if the URL cannot be written at its end.
    """
    with held(path, url):
        if url is None:
            yield None
            return
        with _mirrored(url, path) as mirror:
            yield mirror


@contextmanager
def _mirrored(url: str, copy: Path) -> Iterator[Mirror]:
    """Claim the run at a URL, bring what it holds into a copy, and keep it as the copy is.

    At the end it holds all that the copy does, and is free again.

    Args:
        url: a checked URL.
        copy: a directory that this driver holds (`pipeline.results.lock.held`).

    Raises:
        InputError: the URL cannot be written, is another driver's, or holds something else.
        JobFailedError: in the place of a job's success, if the URL cannot be written at its end.
    """
    with refusing():
        objects = Objects(url)
        note = CopyNote.of(copy, url)
        note.write(copy)
        claim = Claim(objects, note.id)
        claim.take()
    try:
        with refusing():
            published = bring_copy(objects, copy, note)
        mirror = Mirror(objects, copy, note, claim, published)
        try:
            yield mirror
        except BaseException:
            mirror.abandon()
            raise
        mirror.close()
    finally:
        claim.give_back()
