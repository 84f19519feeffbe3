"""YAML from outside: plain data or an `InputError`, whatever the text holds."""

from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import InputError

# What PyYAML's safe constructors let through besides its own errors: `!!bool x` is a KeyError,
# `!!timestamp x` an AttributeError, a month 13 a ValueError, and deep nesting a RecursionError.
_REFUSALS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Raises:
        InputError: it is none; the message says where, in one line.
    """
    try:
        return yaml.safe_load(text)
    except _REFUSALS as error:
        raise InputError(f"not valid YAML: {_what(error)}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping (InputError otherwise)."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot read the spec: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    except ValueError as error:  # a path with a null character
        raise InputError(f"{str(path)!r}: cannot read the spec: {error}") from error
    try:
        content = parse_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: a spec is a mapping of settings, got {type(content).__name__}")
    return content


def _what(error: Exception) -> str:
    """The problem and its place, without the text around it, which may be long or secret."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark):
        problem = " ".join(filter(None, (error.context, error.problem)))
        return f"{problem}, at line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(error).split()) or type(error).__name__
