"""`manifest.jsonl`: the list of a run's parts, one JSON line each, only ever appended to."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ResultsDamagedError
from pipeline.results.damage import first_problem

log = logging.getLogger(__name__)

TableKind = Literal[
    "edits",
    "values",
    "metrics",
    "general",
    "trace",
    "training",
    "attributions",
    "neurons",
    "patches",
    "assessment",
    "memory",
]
TensorKind = Literal["update", "keys", "state", "checkpoint", "piece"]
Kind = Literal[
    "edits",
    "values",
    "patches",
    "piece",
    "metrics",
    "update",
    "general",
    "keys",
    "trace",
    "training",
    "state",
    "attributions",
    "neurons",
    "checkpoint",
    "assessment",
    "memory",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_TENSOR_KINDS: tuple[TensorKind, ...] = get_args(TensorKind)
_OF_THE_UNEDITED: tuple[TableKind, ...] = ("metrics", "general", "trace", "assessment")

_Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
_Index = Annotated[int, Field(ge=0, le=2**31 - 1)]


def table_part_name(kind: TableKind, round: int, shard: int) -> str:
    """Name of a Parquet part inside the run directory; round -1 is the unedited model.

    No `column=value` folder: readers would take one for a second `round` column.
    """
    prefix = "baseline" if round == -1 else f"round-{round:05d}"
    return f"{kind}/{prefix}-shard-{shard:05d}.parquet"


def tensors_name(kind: TensorKind, round: int, layer: int) -> str:
    """Name of a layer's update, of its keys and residuals, of a round's state, of a checkpoint.

    A checkpoint has the number of its steps for a round, and layer 0. Of a piece of a round's
    adapters, `layer` is its number.
    """
    if kind == "update":
        return f"updates/round={round:05d}/layer-{layer:05d}.safetensors"
    if kind == "piece":
        return f"pieces/round={round:05d}/piece-{layer:05d}.safetensors"
    return f"{kind}/round={round:05d}/layer={layer:03d}.safetensors"


class Part(BaseModel):
    """One line of `manifest.jsonl`: a file that belongs to the run, as it was written.

    A Parquet part has `rows`, `shard` and `weight_version` (how many updates the model held), and
    `failed`: the requests of its shard that have no row because they failed, case_id -> reason.
    An update has `layer`, and so have keys, states and checkpoints, and pieces their number. A line
    with `withdrawn` unlists the name again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    kind: Kind
    round: Annotated[int, Field(ge=-1, le=2**31 - 1)]
    shard: _Index | None = None
    layer: _Index | None = None
    rows: _Count | None = None
    bytes: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    weight_version: _Count | None = None
    failed: dict[str, str] = {}
    withdrawn: bool = False

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        table_fields = (self.shard, self.rows, self.weight_version)
        if self.kind in _TENSOR_KINDS:
            if self.layer is None or table_fields != (None, None, None) or self.failed:
                raise ValueError("an update has a layer and no shard, rows or weight_version")
            expected = tensors_name(self.kind, self.round, self.layer)
        else:
            if self.shard is None or None in table_fields or self.layer is not None:
                raise ValueError("a part has a shard, rows and weight_version and no layer")
            expected = table_part_name(cast("TableKind", self.kind), self.round, self.shard)
        if self.round == -1 and self.kind not in _OF_THE_UNEDITED:
            raise ValueError(
                f"only {', '.join(_OF_THE_UNEDITED)} can have round -1, the unedited model"
            )
        # This also keeps every name inside the run directory.
        if self.name != expected:
            raise ValueError(f"the name is {self.name!r}, expected {expected!r}")
        return self

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: kind, round, then shard or layer, whatever the order of writing was."""
        index = self.layer if self.shard is None else self.shard
        assert index is not None
        return KINDS.index(self.kind), self.round, index


def append_line(path: Path, part: Part) -> None:
    """List (or withdraw) a part; returns once the line is on disk.

    Raises:
        OSError: the disk is full; the unfinished line is ignored and cut by the next call.
    """
    with open(path, "r+b") as file:
        _cut_unfinished_line(file.fileno(), path)
        file.seek(0, os.SEEK_END)
        file.write(part.model_dump_json(exclude_defaults=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_unfinished_line(descriptor: int, path: Path) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.truncate(descriptor, path.read_bytes().rfind(b"\n") + 1)


def read_lines(path: Path) -> dict[str, Part]:
    """Return the listed parts by name; the last line of a name counts.

    A last line without its newline was cut short by a crash and is ignored: its part was never
    listed and is written again.

    Raises:
        ResultsDamagedError: the file is missing, or any other line is not what was written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ResultsDamagedError(
            f"{path} is missing: the run's parts cannot be told from leftovers; "
            "restore it from a copy or run the job again in a new directory"
        ) from error
    return parse_lines(data, path)


def parse_lines(data: bytes, source: Path | str) -> dict[str, Part]:
    """The same of a listing that has been read; `source` names it in errors."""
    *lines, unfinished = data.split(b"\n")
    if unfinished:
        log.warning("%s ends in an unfinished line, which is ignored (a crash cut it)", source)
    parts: dict[str, Part] = {}
    for number, line in enumerate(lines, start=1):
        part = _parse(line, number, source)
        if part.withdrawn:
            parts.pop(part.name, None)
        else:
            parts[part.name] = part
    return parts


def _parse(line: bytes, number: int, source: Path | str) -> Part:
    try:
        return Part.model_validate_json(line)
    except ValidationError as error:
        raise ResultsDamagedError(
            f"{source}, line {number} is damaged: {first_problem(error)}; "
            "restore the file from a copy or run the job again in a new directory"
        ) from error


def in_order(parts: Iterable[Part]) -> list[Part]:
    """Sort parts by kind, round, then shard or layer."""
    return sorted(parts, key=lambda part: part.order)
