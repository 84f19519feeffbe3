"""Opening a run for analysis: its tables as Arrow, Polars or pandas."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.errors import InputError
from pipeline.places import below
from pipeline.results.harness import read_harness
from pipeline.results.listing import Kind, TableKind
from pipeline.results.recorded import RecordedRun, check_recorded
from pipeline.results.remote import open_run
from pipeline.results.schemas import SCHEMAS
from pipeline.results.store import MANIFEST, RunStore

Frame = Literal["arrow", "polars", "pandas"]


def read(run: str | Path) -> "Run":
    """Open a run for reading; it may still be growing, or have been interrupted.

    Args:
        run: its directory, or the URL that it is at (docs/cluster.md).

    Raises:
        InputError: it is not a run, or the URL cannot be read.
        ResultsDamagedError: a manifest is damaged.
    """
    return Run(open_run(run))


class Run:
    """The results in a run directory as they were when it was opened; columns in `schemas`.

    Only parts that the run lists are read. Files that an interrupted job left beside them are
    not.
    """

    def __init__(self, store: RunStore) -> None:
        """Use `read`."""
        self._store = store

    @property
    def path(self) -> Path:
        """The run directory; of a run at a URL, a copy of what has been read of it."""
        return self._store.path

    @property
    def place(self) -> str:
        """Where the run is: its directory, or its URL."""
        return self._store.place

    @property
    def manifest(self) -> dict[str, Any]:
        """`manifest.json`: the resolved spec, the model, versions, status and timings."""
        return self._store.manifest

    @property
    def summary(self) -> dict[str, Any]:
        """`summary.json`: the aggregates over all probes.

        Raises:
            InputError: the run has none yet.
        """
        try:
            summary: dict[str, Any] = self._store.read_json("summary.json")
        except FileNotFoundError as error:
            raise InputError(
                f"{self.place} has no summary.json: the job has not finished; resume it first"
            ) from error
        return summary

    @property
    def recorded(self) -> RecordedRun:
        """The entries of `manifest.json` that applying and exporting need, checked.

        Raises:
            ResultsDamagedError: one is missing or another.
        """
        return check_recorded(self.manifest, RecordedRun, below(self.place, MANIFEST))

    def edits(self, as_: Frame = "arrow") -> Any:
        """Return one row a request, as a `pyarrow.Table`, Polars or pandas data frame."""
        return self._table("edits", as_)

    def values(self, as_: Frame = "arrow") -> Any:
        """Return one row a computed value, as a `pyarrow.Table`, Polars or pandas data frame."""
        return self._table("values", as_)

    def metrics(self, as_: Frame = "arrow") -> Any:
        """Return one row a scored probe, as a `pyarrow.Table`, Polars or pandas data frame."""
        return self._table("metrics", as_)

    def general(self, as_: Frame = "arrow") -> Any:
        """Return one row a measure of the whole model, as a `pyarrow.Table` or a data frame."""
        return self._table("general", as_)

    def trace(self, as_: Frame = "arrow") -> Any:
        """Return one row a restored run, as a `pyarrow.Table`, Polars or pandas data frame."""
        return self._table("trace", as_)

    def memory(self, as_: Frame = "arrow") -> Any:
        """Return one row an edit that a memory holds, as a `pyarrow.Table` or a data frame."""
        return self._table("memory", as_)

    def training(self, as_: Frame = "arrow") -> Any:
        """Return one row a step of a gradient method, as a `pyarrow.Table` or a data frame."""
        return self._table("training", as_)

    def attributions(self, as_: Frame = "arrow") -> Any:
        """Return one row a fact and neuron that stands out, as a `pyarrow.Table` or a frame."""
        return self._table("attributions", as_)

    def neurons(self, as_: Frame = "arrow") -> Any:
        """Return one row a fact and neuron that its prompts agree on, as a table or a frame."""
        return self._table("neurons", as_)

    def patches(self, as_: Frame = "arrow") -> Any:
        """Return one row an edit of T-Patcher, as a `pyarrow.Table` or a data frame."""
        return self._table("patches", as_)

    def assessment(self, as_: Frame = "arrow") -> Any:
        """Return one row a fact that was assessed, as a `pyarrow.Table` or a data frame."""
        return self._table("assessment", as_)

    def harness(self, as_: Frame = "arrow") -> Any:
        """Return what `editfleet harness` left, a row a metric, as a table or a data frame.

        Raises:
            ResultsDamagedError: a file is not one of ours.
        """
        return _framed(read_harness(self.path), as_)

    def dataset(self, kind: TableKind) -> ds.Dataset:
        """Return the listed parts as a `pyarrow.dataset`, to scan without loading all of it.

        The scan checks page checksums only; `verify` checks whole files.
        """
        files = self.files(kind)
        if not files:
            return ds.dataset(SCHEMAS[kind].empty_table())
        checked = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        return ds.dataset(
            [str(path) for path in files],
            schema=SCHEMAS[kind],
            format=ds.ParquetFileFormat(default_fragment_scan_options=checked),
        )

    def files(self, kind: Kind, round: int | None = None) -> list[Path]:
        """Return the listed files of a kind, in order of round, then shard or layer.

        Raises:
            ResultsDamagedError: a link leads out of the run directory.
        """
        parts = self._store.parts(kind, round)
        self._store.bring(parts)
        return [self._store.path_of(part) for part in parts]

    def updates(self, round: int | None = None) -> list[Path]:
        """Return the update files (safetensors), in the order in which they were applied."""
        return self.files("update", round)

    def updated_layers(self, round: int) -> set[int]:
        """Return the layers whose update of a round the run holds."""
        return set(self._store.layers("update", round))

    def verify(self) -> None:
        """Check every listed file against its size and SHA-256.

        Raises:
            ResultsDamagedError: naming the first file that differs.
        """
        self._store.verify()

    def _table(self, kind: TableKind, as_: Frame) -> Any:
        return _framed(self._store.read_parts(kind), as_)


def _framed(table: pa.Table, as_: Frame) -> Any:
    if as_ not in ("arrow", "polars", "pandas"):
        raise InputError(f"as_ is {as_!r}, expected 'arrow', 'polars' or 'pandas'")
    if as_ == "arrow":
        return table
    return _import(as_).from_arrow(table) if as_ == "polars" else table.to_pandas()


def _import(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise InputError(
            f"as_={library!r} needs {library}; install it: pip install {library}"
        ) from error
