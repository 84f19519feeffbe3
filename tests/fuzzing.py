"""How hard the fuzz tests try: a few cases each in every run, far more when asked.

`pytest -m fuzz --hypothesis-profile=thorough` (part of `make test-slow`) runs some 30,000 cases.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

THOROUGH = "thorough"

# A test that writes its files anew for every case may share one folder among them.
settings.register_profile(
    THOROUGH, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)

Test = Callable[..., Any]


def fuzz(quick: int, thorough: int) -> Callable[[Test], Test]:
    """Mark a test as one of the fuzz tests, with so many cases in a normal and a thorough run."""
    is_thorough = settings.get_current_profile_name() == THOROUGH
    chosen = settings(
        max_examples=thorough if is_thorough else quick,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    return lambda test: pytest.mark.fuzz(chosen(test))


plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
"""Any JSON value, NaN and infinities among them."""

# Lone surrogates cannot come out of st.text, but the escapes of JSON and YAML can make them.
hostile_json = plain_json | st.sampled_from(
    ["\ud800", ["a\udfff"], {"\ud800": 1}, "\0", "\x1b[2J", "[/]", "\u202e", "{}", "{0}", "%s"]
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut, with some flipped, with a piece taken out, doubled or replaced."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(found)))
        stop = min(len(found), start + draw(st.sampled_from([0, 1, 4, 64, len(found)])))
        piece = bytes(found[start:stop])
        found[start:stop] = draw(
            st.sampled_from([b"", piece * 2, bytes(255 - byte for byte in piece)])
            | st.binary(max_size=12)
        )
    return bytes(found)


@st.composite
def altered(draw: st.DrawFn, content: Any, values: st.SearchStrategy[Any] = hostile_json) -> Any:
    """The JSON value with one of its parts, at any depth, replaced, renamed, doubled or dropped."""
    if draw(st.integers(0, 4)) == 0 or not isinstance(content, dict | list) or not content:
        return draw(values)
    if isinstance(content, list):
        place = draw(st.integers(0, len(content) - 1))
        inner = draw(st.just([]) | altered(content[place], values).map(lambda value: [value]))
        return [*content[:place], *inner, *content[place + 1 :]]
    key = draw(st.sampled_from(sorted(content)))
    others = {name: value for name, value in content.items() if name != key}
    match draw(st.sampled_from(["alter", "alter", "alter", "drop", "rename"])):
        case "drop":
            return others
        case "rename":
            return others | {draw(st.text(max_size=8)): content[key]}
        case _:
            return others | {key: draw(altered(content[key], values))}
