"""Text from outside on its way to a terminal or a log: one line, without control characters."""

import logging
import re
import unicodedata
from typing import Any

_LONGEST = 2000
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Escape what moves a cursor, breaks a line or turns the writing direction, and cut the rest.

    Control and format characters (category C of Unicode, with escape sequences, right-to-left
    marks and lone surrogates among them) and line separators come out as Python would write them.
    Tokens of the Hugging Face hub are blotted out.
    """
    text = _HUB_TOKEN.sub("hf_...", text)
    shown = text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
    return shown if shown.isprintable() else "".join(map(_escaped, shown))


class OneLineFormatter(logging.Formatter):
    """Formats records as one line each; a traceback follows indented, so that it forges no line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line."""
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        """The traceback's lines, each indented and without control characters."""
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"    {one_line(line)}" for line in lines)


def _escaped(character: str) -> str:
    category = unicodedata.category(character)
    is_safe = category[0] != "C" and category not in ("Zl", "Zp")
    return character if is_safe else character.encode("unicode_escape").decode("ascii")
