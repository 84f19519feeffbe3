"""The objects below a URL, by fsspec: read and written whole, with one kind of error."""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.places import OBJECT_STORES


class StoreError(OSError):
    """An object store did not do what it was asked to; the message is one line with the URL.

    Args:
        message: what was asked for, and the store's own reason.
        is_final: asking again would not help.
    """

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final


@contextmanager
def refusing() -> Iterator[None]:
    """Turn what an object store refuses before anything has begun into an InputError."""
    try:
        yield
    except StoreError as error:
        raise InputError(str(error)) from error


class Objects:
    """The objects below a URL, by their names there. Its methods may be called by many threads.

    Args:
        url: a checked URL (`pipeline.places`).

    Raises:
        InputError: the package that speaks its protocol is not installed.
        StoreError: that package cannot start.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        protocol = url.partition("://")[0]
        package, extra = OBJECT_STORES[protocol]
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"{url}: {protocol}:// needs {package}; install it: pip install"
                f" 'editfleet[{extra}]'"
            ) from error
        import fsspec

        with self._asking("cannot be opened"):
            # Other machines write there too: what was seen once may be otherwise now.
            self._fs = fsspec.filesystem(protocol, use_listings_cache=False)
            self._root: str = self._fs._strip_protocol(url)

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none (or no bucket).

        Raises:
            StoreError: it cannot be read.
        """
        with self._asking("cannot be read", name):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object; readers see the old one or the new one.

        Raises:
            StoreError: it cannot be written.
        """
        with self._asking("cannot be written", name):
            self._fs.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one, as one step of the store; whether this wrote it.

        S3 does it by `If-None-Match: *`, Google Cloud Storage by `ifGenerationMatch=0`.

        Raises:
            StoreError: it cannot be written.
        """
        with self._asking("cannot be written", name):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def put(self, path: Path, name: str) -> None:
        """Write a file, which may be larger than memory, as an object.

        Raises:
            StoreError: it cannot be written.
        """
        with self._asking("cannot be written", name):
            self._fs.put_file(str(path), self._path(name))

    def get(self, name: str, path: Path) -> None:
        """Write an object, which may be larger than memory, into a file.

        Raises:
            StoreError: it cannot be read.
        """
        with self._asking("cannot be read", name):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(self._path(name), str(path))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, some of which may not be there.

        Raises:
            StoreError: one cannot be removed.
        """
        for name in names:
            with self._asking("cannot be removed", name), suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of every object below the URL, except names that would leave a folder.

        Raises:
            StoreError: they cannot be listed.
        """
        with self._asking("cannot be listed"):
            try:
                found: dict[str, Any] = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        names = {
            path.removeprefix(f"{self._root}/"): int(info["size"]) for path, info in found.items()
        }
        return {
            name: size
            for name, size in names.items()
            if {"", ".", ".."}.isdisjoint(name.split("/")) and "\\" not in name
        }

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _asking(self, what: str, name: str | None = None) -> Iterator[None]:
        try:
            yield
        except (InputError, MemoryError):
            raise
        except Exception as error:
            # The errors of these packages have no base in common (botocore's are no OSError).
            place = self.url if name is None else f"{self.url}/{name}"
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StoreError(
                f"{place} {what}: {reason}",
                is_final=isinstance(error, PermissionError | FileNotFoundError),
            ) from error
