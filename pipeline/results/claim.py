"""One driver at a time on a run at a URL: an object that only one can create.

It has the name and content of the file by which a run directory says who drives it. Unlike a lock
of the operating system it outlives a driver that is killed. Such a one goes on with its own copy of
the run, which nobody else can hold then: the object names the copy, and is taken over.
"""

import json
import logging
import os
import socket
from dataclasses import asdict
from datetime import UTC, datetime

from pipeline.errors import InputError
from pipeline.results.lock import Owner, parse_owner
from pipeline.results.objects import Objects, StoreError
from pipeline.results.place import OWNER

log = logging.getLogger(__name__)


class Claim:
    """The claim of one driver, or of the drivers of one copy, to the run at a URL.

    Args:
        objects: of the URL.
        copy_id: of the copy that the driver works on, whose lock it holds.
    """

    def __init__(self, objects: Objects, copy_id: str) -> None:
        self.objects, self.copy_id = objects, copy_id

    def take(self) -> None:
        """Claim the run.

        Raises:
            InputError: another driver has, or one on another machine that was killed.
            StoreError: the claim cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        owner = asdict(Owner(socket.gethostname(), os.getpid(), now))
        data = json.dumps({**owner, "copy": self.copy_id}).encode()
        # Asked first, for a store that does not know `If-None-Match` ignores it and writes.
        found = self.objects.read(OWNER)
        if found is None:
            if self.objects.create(OWNER, data):
                return
            found = self.objects.read(OWNER)
        if self._is_ours(found):
            self.objects.write(OWNER, data)
            return
        url = self.objects.url
        who = claimed_by(found, url) or "unknown"
        raise InputError(
            f"{url}: another driver ({who}) is working on this run; wait for it or end it, or"
            " choose another output.path. If it was killed and will not be started again on its"
            f" machine, delete the object {url}/{OWNER}"
        )

    def require(self) -> None:
        """Check that nobody else has claimed the run since.

        Raises:
            StoreError: somebody has, or it cannot be told.
        """
        found = self.objects.read(OWNER)
        if not self._is_ours(found):
            who = claimed_by(found, self.objects.url) or "unknown"
            raise StoreError(
                f"{self.objects.url}: the claim of this driver was deleted, and another driver may"
                f" be working on the run ({who})",
                is_final=True,
            )

    def give_back(self) -> None:
        """Delete the claim; where that cannot be done, say so."""
        try:
            if self._is_ours(self.objects.read(OWNER)):
                self.objects.remove([OWNER])
        except StoreError as error:
            log.warning("%s; delete it before another machine goes on with the run", error)

    def _is_ours(self, found: bytes | None) -> bool:
        try:
            return found is not None and bool(json.loads(found)["copy"] == self.copy_id)
        except (ValueError, KeyError, TypeError, RecursionError):
            return False


def claimed_by(found: bytes | None, url: str) -> Owner | None:
    """Who wrote a claim; None if there is none, or it does not say."""
    return None if found is None else parse_owner(found, f"{url}/{OWNER}")
