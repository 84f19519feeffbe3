"""What a driver writes into its copy of a run, kept at the run's URL as well.

A thread sends what is new: the parts first, then the listing that lists them, then `manifest.json`.
Each object is written whole, so that at every moment the URL holds a run that any machine can read
and go on with, as a run directory does (docs/cluster.md).
"""

import hashlib
import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

from pipeline.errors import JobFailedError
from pipeline.results.claim import Claim
from pipeline.results.copying import (
    BESIDE,
    DIRECTORIES,
    CopyNote,
    Published,
    at_once,
    digest,
    signature,
)
from pipeline.results.listing import Part
from pipeline.results.objects import Objects, StoreError
from pipeline.results.place import LISTING, MANIFEST, is_run
from pipeline.results.store import RunStore

log = logging.getLogger(__name__)

# A listing is sent whole each time. Between two times it rests so many times as long as sending
# took, so that long listings do not fill the connection.
_REST = 10.0
_LONGEST_REST_SECONDS = 30.0
_GIVE_UP_SECONDS = 300.0
_LONGEST_PAUSE_SECONDS = 30.0


class _Replaced(Exception):
    """The file of a part that was being sent is that of a later one."""


class Mirror:
    """Keeps the run at a URL as its copy on this machine is.

    Args:
        objects: of the URL.
        copy: the driver's copy, with its note.
        note: what the copy says about itself.
        claim: this driver's, checked before anything is listed.
        published: what the URL holds.
    """

    def __init__(
        self, objects: Objects, copy: Path, note: CopyNote, claim: Claim, published: Published
    ) -> None:
        self.objects, self.copy, self.note, self.claim = objects, copy, note, claim
        self.published = published
        self._thread: threading.Thread | None = None
        self._news, self._ending, self._hurry = (threading.Event() for _ in range(3))
        self._error: Exception | None = None
        self._has_ended = False

    def follow(self, store: RunStore) -> None:
        """Send what the copy holds, and then, in the background, all that the store writes.

        Raises:
            StoreError: the URL cannot be written.
        """
        self.send()
        store.on_change = self._changed
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Return once the URL holds all that the copy does.

        Raises:
            JobFailedError: it cannot be written.
        """
        try:
            self._end()
        except OSError as error:
            raise JobFailedError(
                f"{error}; all that was finished is kept in {self.copy}, and the same command sends"
                " it and goes on from there"
            ) from error

    def abandon(self) -> None:
        """The same for a job that ends early, in one attempt; a failure goes to the log."""
        self._hurry.set()
        try:
            self._end()
        except OSError as error:
            log.warning("%s; what it lacks is kept in %s", error, self.copy)

    def send(self) -> None:
        """Send what the copy holds and the URL does not.

        Raises:
            StoreError: the URL cannot be written, or a file of the copy is damaged.
        """
        while is_run(self.copy):
            before = (self.copy / LISTING).stat().st_size
            try:
                self._send()
                return
            except _Replaced as error:
                # The driver unlists a part before it writes another in its place.
                if (self.copy / LISTING).stat().st_size == before:
                    raise StoreError(
                        f"{self.copy}/{error} is damaged, and is not sent to {self.objects.url}",
                        is_final=True,
                    ) from error

    def _changed(self) -> None:
        """Called by the driver's thread after everything that it writes."""
        if self._error is not None:
            raise StoreError(str(self._error)) from self._error
        self._news.set()

    def _work(self) -> None:
        try:
            is_last = False
            while not is_last:
                self._news.wait()
                self._news.clear()
                is_last = self._ending.is_set()
                began = time.monotonic()
                self._send_patiently()
                rest = _REST * (time.monotonic() - began)
                self._ending.wait(min(rest, _LONGEST_REST_SECONDS))
        except Exception as error:  # raised by the driver's thread
            self._error = error

    def _send_patiently(self) -> None:
        """Send; where that fails try again for some minutes, unless it cannot help."""
        until, pause = time.monotonic() + _GIVE_UP_SECONDS, 1.0
        while True:
            try:
                self.send()
                return
            except StoreError as error:
                if error.is_final or self._hurry.is_set() or time.monotonic() > until:
                    raise
                log.warning("%s; trying again in %.0f s", error, pause)
            self._hurry.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _end(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        if self._thread is None:
            self._send_patiently()
            return
        self._ending.set()
        self._news.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _send(self) -> None:
        # Read first and sent last: what it says of the rest is then at the URL.
        manifest = (self.copy / MANIFEST).read_bytes()
        self._send_parts()
        at_once(self._send_file, self._files())
        if manifest != self.published.manifest:
            self.objects.write(MANIFEST, manifest)
            self.published.manifest = manifest
        if not self.note.is_published:
            self.note = replace(self.note, is_published=True)
            self.note.write(self.copy)

    def _send_parts(self) -> None:
        known = self.published
        listing = (self.copy / LISTING).read_bytes()
        listing = listing[: listing.rfind(b"\n") + 1]
        new = listing[known.length or 0 :].splitlines()
        # The last line of a name counts.
        lines = {part.name: part for part in map(Part.model_validate_json, new)}
        gone = [
            known.parts[name]
            for name, part in lines.items()
            if name in known.parts and (part.withdrawn or part.sha256 != known.parts[name].sha256)
        ]
        if gone:
            # As the driver does: nobody shall find a new object under the hash of the old one.
            self._publish(listing[: known.length or 0] + b"".join(map(_unlisting, gone)))
            for part in gone:
                del known.parts[part.name]
            self.objects.remove(part.name for part in gone)
        self._send_owed(lines)
        at_once(
            self._send_part,
            [
                part
                for name, part in lines.items()
                if not part.withdrawn and name not in known.parts
            ],
        )
        if lines or known.length is None:
            self._publish(listing)
        known.length = len(listing)
        known.parts |= {name: part for name, part in lines.items() if not part.withdrawn}

    def _send_owed(self, lines: dict[str, Part]) -> None:
        """Send what the URL lists and has lost, as far as the copy has it."""
        known = self.published
        for name in sorted(known.owed & known.parts.keys() - lines.keys()):
            if digest(self.copy / name) == known.parts[name].sha256:
                self._send_part(known.parts[name])
        known.owed.clear()

    def _send_part(self, part: Part) -> None:
        try:
            data = (self.copy / part.name).read_bytes()
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise _Replaced(part.name)
        self.objects.write(part.name, data)

    def _publish(self, listing: bytes) -> None:
        self.claim.require()
        self.objects.write(LISTING, listing)

    def _files(self) -> list[Path]:
        """The files that a driver writes beside the parts."""
        whole = [path for name in DIRECTORIES for path in (self.copy / name).rglob("*")]
        found = [*whole, *(self.copy / name for name in BESIDE)]
        return [path for path in found if path.is_file()]

    def _send_file(self, path: Path) -> None:
        name, now = path.relative_to(self.copy).as_posix(), signature(path)
        if self.published.files.get(name) == now:
            return
        if name in BESIDE:
            # The driver may be appending to it.
            self.objects.write(name, path.read_bytes())
        else:
            self.objects.put(path, name)
        self.published.files[name] = now


def _unlisting(part: Part) -> bytes:
    withdrawn = part.model_copy(update={"withdrawn": True, "failed": {}})
    return withdrawn.model_dump_json(exclude_defaults=True).encode() + b"\n"
