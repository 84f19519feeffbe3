"""`manifest.json`, and the other JSON files of a run, as plain data."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, ResultsDamagedError
from pipeline.results.schemas import SCHEMA_VERSION


def parse_manifest(data: bytes, source: Path | str) -> dict[str, Any]:
    """What `manifest.json` holds; `source` names it in errors.

    Raises:
        InputError: it is of another schema version.
        ResultsDamagedError: it is not JSON.
    """
    manifest = parse_json(data, source)
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{source}: schema_version is {version!r}, this editfleet reads "
            f"{SCHEMA_VERSION}; open the run with the editfleet that wrote it"
        )
    found: dict[str, Any] = manifest
    return found


def parse_json(data: bytes, source: Path | str) -> Any:
    """What a JSON file of a run holds; `source` names it in errors.

    Raises:
        ResultsDamagedError: it is not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ResultsDamagedError(
            f"{source} is not JSON ({error}); restore it from a copy or run the job again in a "
            "new directory"
        ) from error
