"""What reaches a terminal or a log: one line, no control characters, no tokens."""

import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.printable import OneLineFormatter, one_line

TOKEN = "hf_abcdefghijABCDEFGHIJabcdefghijABCD"


@given(text=st.text() | st.text(st.characters(categories=["C", "Z"])))
def test_any_text_becomes_one_line_that_moves_no_cursor(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert not [c for c in line if c != " " and not c.isspace() and not c.isprintable()]
    line.encode("utf-8")
    assert one_line(line) == line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Łódź 東京 é", "Łódź 東京 é"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31m\x07\x9b", r"\x1b[31m\x07\x9b"),
        ("\u202e\u200f\u2028\u2066", r"\u202e\u200f\u2028\u2066"),
        ("\ud800\0", r"\ud800\x00"),
        ("\U000e0041", r"\U000e0041"),
        ("[red]{}%s", "[red]{}%s"),
        (f"token {TOKEN}!", "token hf_...!"),
    ],
)
def test_what_is_escaped(text: str, shown: str) -> None:
    assert one_line(text) == shown


def test_long_texts_are_cut() -> None:
    assert one_line("x" * 100_000, 10) == "x" * 10 + "... (100000 characters)"
    assert len(one_line("\0" * 100_000)) < 10_000


def test_a_log_cannot_be_forged() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLineFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("forged")
    logger.addHandler(handler)
    logger.warning("subject %s", "a\nERROR forged\x1b[2J")
    try:
        raise ValueError(f"b\nERROR forged\x1b[2J {TOKEN}")
    except ValueError:
        logger.exception("caught")
    lines = stream.getvalue().splitlines()
    assert lines[0] == r"WARNING subject a\nERROR forged\x1b[2J"
    assert lines[1] == "ERROR caught" and all(line.startswith("    ") for line in lines[2:])
    assert "\x1b" not in stream.getvalue() and TOKEN not in stream.getvalue()
