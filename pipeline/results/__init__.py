"""The run directory: schemas, atomic writes, the list of parts, and reading it all back."""

from pipeline.results.listing import Part
from pipeline.results.reading import Run, read
from pipeline.results.store import RunStore

__all__ = ["Part", "Run", "RunStore", "read"]
