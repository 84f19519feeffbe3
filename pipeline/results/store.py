"""The run directory: parts written whole, fsynced, renamed, then listed. One process writes.

Threads of it may write at the same time, as long as no two write parts of one kind and round.
"""

import copy
import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import InputError, ResultsDamagedError
from pipeline.places import below
from pipeline.results.atomic import make_directory, write_atomically
from pipeline.results.encoding import to_json, to_parquet, with_sorted_header
from pipeline.results.listing import (
    Kind,
    Part,
    TableKind,
    TensorKind,
    append_line,
    in_order,
    read_lines,
    table_part_name,
    tensors_name,
)
from pipeline.results.manifest_file import parse_json, parse_manifest
from pipeline.results.parts import problem_of, read_table, require_inside
from pipeline.results.place import LISTING, MANIFEST, is_run, require_fresh
from pipeline.results.schemas import SCHEMA_VERSION, SCHEMAS, conform

if TYPE_CHECKING:
    import torch


class RunStore:
    """A run directory, made with `create` or opened with `open`.

    It knows the parts that were listed when it was made plus those it wrote itself.

    Attributes:
        path: the directory.
        place: what errors call the run: the directory, or the URL that it is a copy of.
        on_change: called after everything that is written.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        parts: dict[str, Part],
        place: str | None = None,
    ) -> None:
        """Use `create` or `open`."""
        self.path, self.place = path, place or str(path)
        self.on_change: Callable[[], None] = _nothing
        self._manifest = manifest
        self._listing = threading.RLock()
        self._parts: dict[str, Part] = {}
        # A round asks for its own parts: what it costs must not grow with the rounds before it.
        self._by_round: dict[tuple[Kind, int], dict[str, Part]] = defaultdict(dict)
        for part in parts.values():
            self._remember(part)

    @classmethod
    def create(
        cls, path: Path, manifest: Mapping[str, Any], place: str | None = None
    ) -> "RunStore":
        """Make a run directory with its `manifest.json`; `place` is its URL if it is a copy.

        Raises:
            InputError: the directory holds something already, or cannot be made.
        """
        path = Path(path)
        require_fresh(path)
        try:
            make_directory(path)
            (path / LISTING).touch()
        except OSError as error:
            raise InputError(
                f"{path}: cannot make the run directory ({error.strerror}); "
                "choose another output.path"
            ) from error
        store = cls(path, {"schema_version": SCHEMA_VERSION, **manifest}, {}, place)
        # Last, because its presence is what makes the directory a run.
        store.update_manifest()
        return store

    @classmethod
    def open(cls, path: Path, place: str | None = None) -> "RunStore":
        """Open an existing run directory; `place` is its URL if it is a copy.

        Raises:
            InputError: it is not a run directory, or one of another schema version.
            ResultsDamagedError: a manifest is damaged.
        """
        path = Path(path)
        if not is_run(path):
            raise InputError(f"{path} is not a run directory: it has no {MANIFEST}")
        manifest = parse_manifest((path / MANIFEST).read_bytes(), path / MANIFEST)
        return cls(path, manifest, read_lines(path / LISTING), place)

    @property
    def manifest(self) -> dict[str, Any]:
        """A copy of `manifest.json`."""
        return copy.deepcopy(self._manifest)

    def update_manifest(self, **fields: Any) -> None:
        """Set top-level fields of `manifest.json` and write it atomically."""
        manifest = {**self._manifest, **copy.deepcopy(fields)}
        write_atomically(self.path / MANIFEST, to_json(manifest))
        self._manifest = manifest
        self.on_change()

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file such as `summary.json` into the run directory, atomically.

        Raises:
            ValueError: the content holds NaN or an infinity, which JSON does not have.
        """
        assert Path(name).name == name and name != MANIFEST, name
        write_atomically(self.path / name, to_json(content))
        self.on_change()

    def read_json(self, name: str) -> Any:
        """Return the content of a file that `write_json` wrote.

        Raises:
            FileNotFoundError: it has not been written.
            ResultsDamagedError: it is not JSON.
        """
        return parse_json((self.path / name).read_bytes(), below(self.place, name))

    def write_part(
        self,
        kind: TableKind,
        rows: pa.Table | list[dict[str, Any]],
        *,
        round: int,
        shard: int,
        weight_version: int,
        failed: Mapping[str, str] | None = None,
    ) -> str:
        """Write the rows of one shard and list them; return the part's name.

        Writing a part again replaces it. After a crash the part is there whole or not listed, and
        so are the requests of the shard that `failed`, case_id -> reason.

        Raises:
            TypeError: the rows do not fit the schema, or belong to another round.
            OSError: the disk is full; the part is not listed.
        """
        table = conform(kind, rows)
        if strangers := set(table["round"].unique().to_pylist()) - {round}:
            raise TypeError(f"{kind} rows of round {sorted(strangers)} in a part of round {round}")
        data = to_parquet(table)
        part = Part(
            name=table_part_name(kind, round, shard),
            kind=kind,
            round=round,
            shard=shard,
            rows=table.num_rows,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            weight_version=weight_version,
            failed=dict(failed or {}),
        )
        return self._commit(part, data)

    def write_tensors(
        self,
        kind: TensorKind,
        tensors: "Mapping[str, torch.Tensor]",
        *,
        round: int,
        layer: int,
        metadata: Mapping[str, str],
    ) -> str:
        """Write one layer's tensors of one round as safetensors and list them; return the name.

        The same tensors and metadata give the same bytes.

        Raises:
            OSError: the disk is full; they are not listed.
        """
        from safetensors.torch import save  # imports torch

        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        data = with_sorted_header(save(contiguous, metadata=dict(metadata)))
        part = Part(
            name=tensors_name(kind, round, layer),
            kind=kind,
            round=round,
            layer=layer,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        return self._commit(part, data)

    def _commit(self, part: Part, data: bytes) -> str:
        listed = self._parts.get(part.name)
        if listed is not None:
            # Else a crash right after the rename would leave the new file under the old hash.
            self.withdraw(listed)
        write_atomically(self.path_of(part), data)
        with self._listing:
            append_line(self.path / LISTING, part)
            self._remember(part)
        self.on_change()
        return part.name

    def _remember(self, part: Part) -> None:
        self._parts[part.name] = part
        self._by_round[part.kind, part.round][part.name] = part

    def withdraw(self, part: Part) -> None:
        """Unlist a part, to be written again; its file stays until then and counts for nothing."""
        gone = part.model_copy(update={"withdrawn": True, "failed": {}})
        with self._listing:
            append_line(self.path / LISTING, gone)
            del self._parts[part.name]
            del self._by_round[part.kind, part.round][part.name]

    def parts(
        self,
        kind: Kind | None = None,
        round: int | None = None,
        shards: Container[int] | None = None,
    ) -> list[Part]:
        """Return the listed parts, ordered by kind, round, then shard or layer.

        Args:
            kind: those of this kind only.
            round: those of this round only.
            shards: those of a kind and round with these shard numbers only.
        """
        if kind is not None and round is not None:
            found = in_order(self._by_round.get((kind, round), {}).values())
            return found if shards is None else [part for part in found if part.shard in shards]
        assert shards is None, "shards are counted in a round"
        return in_order(
            part
            for part in self._parts.values()
            if kind in (None, part.kind) and round in (None, part.round)
        )

    def failed(
        self, kind: TableKind, round: int, shards: Container[int] | None = None
    ) -> dict[str, str]:
        """Return case_id -> reason of the requests that failed in listed parts, in their order."""
        return {
            case_id: reason
            for part in self.parts(kind, round, shards)
            for case_id, reason in part.failed.items()
        }

    def layers(self, kind: TensorKind, round: int) -> dict[int, Path]:
        """Layer -> file of the tensors of a kind that are listed for a round."""
        parts = self.parts(kind, round)
        self.bring(parts)
        return {part.layer: self.path_of(part) for part in parts if part.layer is not None}

    def has_part(self, kind: TableKind, round: int, shard: int) -> bool:
        """Whether the shard's part is listed."""
        return table_part_name(kind, round, shard) in self._parts

    def read_parts(
        self, kind: TableKind, round: int | None = None, shards: Container[int] | None = None
    ) -> pa.Table:
        """Return the rows of the listed parts, each checked as by `verify`, in order of `parts`.

        Raises:
            ResultsDamagedError: a part is missing or damaged.
        """
        tables = [SCHEMAS[kind].empty_table()]
        parts = self.parts(kind, round, shards)
        self.bring(parts)
        for part in parts:
            self._check(part)
            try:
                tables.append(read_table(kind, self.path_of(part)))
            except ValueError as error:
                raise self._damaged(part, str(error)) from error
        return pa.concat_tables(tables, promote_options="default")

    def verify(self) -> None:
        """Check the presence, size, SHA-256 and row count of every listed file.

        Raises:
            ResultsDamagedError: naming the first file that differs from its line.
        """
        self.bring(self.parts())
        for part in self.parts():
            self._check(part)

    def damaged(self) -> list[tuple[Part, ResultsDamagedError]]:
        """Check as `verify` does, and return every part that differs, with what is wrong."""
        self.bring(self.parts())
        found = []
        for part in self.parts():
            try:
                self._check(part)
            except ResultsDamagedError as error:
                found.append((part, error))
        return found

    def bring(self, parts: Sequence[Part]) -> None:
        """Called before files of parts are read; in a run directory they are there already."""

    @property
    def holds_model(self) -> bool:
        """Whether the edited model is there."""
        return (self.path / "model").is_dir()

    def path_of(self, part: Part) -> Path:
        """The file of a part, which may have to be brought first.

        Raises:
            ResultsDamagedError: a link in its place leads out of the run directory.
        """
        path = self.path / part.name
        try:
            return require_inside(path, self.path)
        except ValueError as error:
            raise self._damaged(part, str(error)) from error

    def _check(self, part: Part) -> None:
        if problem := problem_of(self.path_of(part), part):
            raise self._damaged(part, problem)

    def _damaged(self, part: Part, what: str) -> ResultsDamagedError:
        remedy = "restore it from a copy, or resume the job, which computes it again"
        return ResultsDamagedError(f"{below(self.place, part.name)} {what}; {remedy}")


def _nothing() -> None:
    """What a store does after a change unless told otherwise."""
