"""`manifest.jsonl`: a cut last line is tolerated, any other damage is named and refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import InputError, ResultsDamagedError
from pipeline.results import RunStore
from tests.fuzzing import fuzz

MakeRows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def listing(store: RunStore, metric_rows: MakeRows) -> Path:
    """The listing of a run with three metrics parts of three rows."""
    for shard in range(3):
        rows = metric_rows(0, shard)
        store.write_part("metrics", rows, round=0, shard=shard, weight_version=1)
    return store.path / "manifest.jsonl"


def test_a_last_line_cut_anywhere_is_ignored_then_replaced(
    listing: Path, metric_rows: MakeRows, caplog: pytest.LogCaptureFixture
) -> None:
    whole = listing.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        listing.write_bytes(whole[:end])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            store = RunStore.open(listing.parent)
        assert [part.shard for part in store.parts()] == [0, 1]
        assert ("unfinished line" in caplog.text) == (end > start)
    store.write_part("metrics", metric_rows(0, 2), round=0, shard=2, weight_version=1)
    assert listing.read_bytes() == whole
    RunStore.open(listing.parent).verify()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"null", b"[]", b"{}", b"\0" * 40])
def test_any_other_damaged_line_is_named(listing: Path, number: int, damage: bytes) -> None:
    lines = listing.read_bytes().split(b"\n")
    lines[number - 1] = damage
    listing.write_bytes(b"\n".join(lines))
    with pytest.raises(
        ResultsDamagedError, match=rf"manifest\.jsonl, line {number} is damaged: .*; restore"
    ):
        RunStore.open(listing.parent)


@pytest.mark.parametrize(
    ("field", "content"),
    [
        ("name", "/etc/passwd"),
        ("name", "../other/metrics/round-00000-shard-00000.parquet"),
        ("name", "metrics/../../x.parquet"),
        ("name", "metrics/round-00000-shard-00001.parquet"),
        ("name", ""),
        ("kind", "models"),
        ("kind", "edits"),
        ("kind", "update"),
        ("round", -1),
        ("round", 0.5),
        ("round", 10**30),
        ("shard", None),
        ("layer", 3),
        ("rows", -1),
        ("rows", "3"),
        ("sha256", "0"),
        ("bytes", None),
        ("colour", 1),
    ],
)
def test_lines_that_say_the_impossible(listing: Path, field: str, content: object) -> None:
    first, *others = listing.read_text().splitlines()
    line = {**json.loads(first), field: content}
    listing.write_text("\n".join([json.dumps(line), *others]) + "\n")
    with pytest.raises(ResultsDamagedError, match="line 1 is damaged") as caught:
        RunStore.open(listing.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "content"), [("rows", 4), ("bytes", 1), ("sha256", "0" * 64)])
def test_lines_that_differ_from_the_file(listing: Path, field: str, content: object) -> None:
    first, *others = listing.read_text().splitlines()
    line = {**json.loads(first), field: content}
    listing.write_text("\n".join([json.dumps(line), *others]) + "\n")
    store = RunStore.open(listing.parent)
    with pytest.raises(ResultsDamagedError, match=r"round-00000-shard-00000\.parquet has"):
        store.verify()
    with pytest.raises(ResultsDamagedError, match=r"round-00000-shard-00000\.parquet has"):
        store.read_parts("metrics")


def test_a_lost_listing_is_refused(listing: Path) -> None:
    listing.unlink()
    with pytest.raises(ResultsDamagedError, match=r"manifest\.jsonl is missing"):
        RunStore.open(listing.parent)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, metric_rows: MakeRows) -> tuple[Path, bytes]:
    store = RunStore.create(tmp_path_factory.mktemp("fuzzed"), {})
    for shard in range(2):
        store.write_part("metrics", metric_rows(-1, shard), round=-1, shard=shard, weight_version=0)
    return store.path, (store.path / "manifest.jsonl").read_bytes()


def check_reads_or_refuses(path: Path, listing: bytes) -> None:
    (path / "manifest.jsonl").write_bytes(listing)
    try:
        store = RunStore.open(path)
        table = store.read_parts("metrics")
        store.verify()
    except (ResultsDamagedError, InputError) as error:
        assert "\n" not in str(error)
    else:
        assert table.num_rows == 3 * len(store.parts("metrics"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(
    [
        "name",
        "kind",
        "round",
        "shard",
        "layer",
        "rows",
        "bytes",
        "sha256",
        "withdrawn",
        "failed",
        "x",
    ]
)


@fuzz(120, 1500)
@given(changes=st.dictionaries(fields, json_values, max_size=3), line=st.sampled_from([0, 1]))
@example(changes={"failed": {"\n": None}}, line=0)
def test_fuzzed_fields(fuzzed: tuple[Path, bytes], changes: dict[str, Any], line: int) -> None:
    path, listing = fuzzed
    lines = [json.loads(text) for text in listing.splitlines()]
    lines[line].update(changes)
    check_reads_or_refuses(path, "".join(json.dumps(one) + "\n" for one in lines).encode())


@fuzz(120, 1500)
@given(start=st.integers(0, 600), length=st.integers(0, 30), replacement=st.binary(max_size=20))
@example(start=0, length=0, replacement=b"[" * 100_000 + b"\n")
@example(start=0, length=0, replacement=b'{"rows": ' + b"9" * 5000 + b"}\n")
def test_fuzzed_bytes(
    fuzzed: tuple[Path, bytes], start: int, length: int, replacement: bytes
) -> None:
    path, listing = fuzzed
    check_reads_or_refuses(path, listing[:start] + replacement + listing[start + length :])
