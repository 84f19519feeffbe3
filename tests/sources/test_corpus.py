"""Corpora of every format; run with `pytest tests/sources/test_corpus.py`."""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import factworld
from pipeline.errors import InputError
from pipeline.sources.corpus import corpus_digest, read_corpus

TEXTS = ["Ana sings.", "Bo hums.", "Çelik whistles.", "Dai yodels.", "Eve is silent."]


def read_all(path: object, field: str = "text") -> list[str]:
    return read_corpus(str(path), field=field, samples=None, seed=0)


def as_txt(folder: Path, texts: list[str]) -> Path:
    (folder / "c.txt").write_bytes("".join(f"{text}\n" for text in texts).encode())
    return folder / "c.txt"


def as_other_ending(folder: Path, texts: list[str]) -> Path:
    return as_txt(folder, texts).rename(folder / "c.corpus")


def as_json(folder: Path, texts: list[str]) -> Path:
    (folder / "c.json").write_text(json.dumps(texts, indent=1))
    return folder / "c.json"


def as_json_objects(folder: Path, texts: list[str]) -> Path:
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    (folder / "c.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder / "c.json"


def as_jsonl(folder: Path, texts: list[str]) -> Path:
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    (folder / "c.jsonl").write_bytes("\n\n".join(lines).encode())
    return folder / "c.jsonl"


def as_ndjson_objects(folder: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"text": text}) + "\r\n" for text in texts]
    (folder / "c.ndjson").write_bytes("".join(lines).encode())
    return folder / "c.ndjson"


def as_parquet(folder: Path, texts: list[str]) -> Path:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(table, folder / "c.parquet", row_group_size=2)
    return folder / "c.parquet"


def as_large_parquet(folder: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), folder / "c.parquet")
    return folder / "c.parquet"


def as_dataset(folder: Path, texts: list[str]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved")
    return folder / "saved"


Writer = Callable[[Path, list[str]], Path]
FILES: list[Writer] = [
    as_txt,
    as_other_ending,
    as_json,
    as_json_objects,
    as_jsonl,
    as_ndjson_objects,
    as_parquet,
    as_large_parquet,
]


@pytest.fixture
def offline_with_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("write", [*FILES, as_dataset])
def test_formats_give_the_same_texts_and_draws(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path, [*TEXTS[:2], "", " \t", *TEXTS[2:]])
    assert read_all(path) == TEXTS
    drawn = read_corpus(str(path), field="text", samples=3, seed=7)
    assert drawn == random.Random(7).sample(TEXTS, 3)


# Plain text cannot hold a line feed, and loses a carriage return before one.
@pytest.mark.parametrize("write", [*FILES, as_dataset])
def test_any_text_round_trips(write: Writer) -> None:
    lines = write in (as_txt, as_other_ending)
    text = st.text(
        st.characters(exclude_characters="\r\n" if lines else "", exclude_categories=["Cs"])
    )

    @settings(max_examples=10 if write is as_dataset else 40, deadline=None)
    @given(st.lists(text.filter(lambda t: t.strip(" \t\r\n\v\f") != ""), min_size=1, max_size=8))
    def check(texts: list[str]) -> None:
        if lines:
            texts[0] = "first" + texts[0]  # a byte order mark at the very start is no text
        with tempfile.TemporaryDirectory() as folder:
            assert read_all(write(Path(folder), texts)) == texts

    check()


def test_other_field(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"body": "x", "text": 1}\n"a plain string"\n')
    assert read_all(tmp_path / "c.jsonl", "body") == ["x", "a plain string"]
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), tmp_path / "c.parquet")
    assert read_all(tmp_path / "c.parquet", "body") == ["x"]


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n")
    assert read_all(tmp_path / "c.txt") == ["one", "two"]


def test_splits_and_folders_of_data_sets(tmp_path: Path, offline_with_own_cache: None) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {
        "train": datasets.Dataset.from_dict({"text": TEXTS[:2]}),
        "test": datasets.Dataset.from_dict({"text": TEXTS[2:]}),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read_all(f"{tmp_path / 'saved'}:test") == TEXTS[2:]
    with pytest.raises(InputError, match=r"has more than one split; write .*: and one of train, t"):
        read_all(tmp_path / "saved")
    (tmp_path / "folder.parquet").mkdir()
    as_parquet(tmp_path / "folder.parquet", TEXTS)
    assert read_all(tmp_path / "folder.parquet") == TEXTS
    with pytest.raises(InputError, match=r"cannot be loaded as a data set: .+; check the name"):
        read_all("nobody/absent-corpus")


def test_factworld_is_what_write_corpus_writes(tmp_path: Path) -> None:
    factworld.write_corpus(tmp_path / "c.txt")
    texts = read_all("factworld")
    assert len(texts) > 5000
    assert texts == read_all(tmp_path / "c.txt")


def test_draws(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(200)]
    path = str(as_json(tmp_path, texts))

    def draw(samples: int | None, seed: int) -> list[str]:
        return read_corpus(path, field="text", samples=samples, seed=seed)

    assert draw(50, 1) == draw(50, 1) == random.Random(1).sample(texts, 50)
    assert draw(50, 1) != draw(50, 2)
    assert len(set(draw(50, 1))) == 50
    for samples in (None, 200, 201):
        assert draw(samples, 1) == draw(samples, 2) == texts


def test_digest() -> None:
    data = b"".join(len(t.encode()).to_bytes(8, "big") + t.encode() for t in TEXTS)
    assert corpus_digest(TEXTS) == hashlib.sha256(data).hexdigest()
    different = [[], [""], ["", ""], ["ab"], ["a", "b"], ["b", "a"]]
    assert len({corpus_digest(texts) for texts in different}) == len(different)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b"\n \n", "holds no texts; give a covariance.corpus with at least one"),
        ("c.txt", b"ok\nb\xff", "not valid UTF-8 at byte 4 (0xff); save it as UTF-8"),
        ("c.json", b"[]", "holds no texts; give a"),
        ("c.json", b'["", " "]', "holds no texts; give a"),
        ("c.json", b'{"text": "a"}', "holds an object, expected a list; put the texts in [ ]"),
        ("c.json", b'["a",\n "b"', "line 2, column 5: not JSON: Expecting ',' delimiter; correct"),
        ("c.json", b"[" * 100_000, "line 1: not readable as JSON: "),
        ("c.json", b'["a", 1]', "row 1: is a number, expected a string or an object with the fi"),
        ("c.json", b'[{"text": null}]', "row 0, field text: is null, expected a string; correct"),
        ("c.json", b'["a", {"body": "b"}]', "row 1: has no field text; its fields are 'body'; set"),
        ("c.json", b"[{}]", "row 0: has no field text; its fields are none; set covariance.field"),
        ("c.json", b'["\\ud800"]', "row 0: is not valid Unicode (a lone surrogate); write it as"),
        ("c.jsonl", b"", "holds no texts; give a"),
        ("c.jsonl", b'"a"\n\n{"text": ', "line 3, column 10: not JSON: Expecting value; correct"),
        ("c.jsonl", b'"a"\n\n[1]', "row 1: is a list, expected a string or an object with the fi"),
        ("c.jsonl", b'"\xff"', "not valid UTF-8 at byte 1 (0xff)"),
        ("c.parquet", b"no", "cannot be read as Parquet: "),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([], pa.string()), "holds no texts; give a covariance.corpus"),
        (pa.array(["a", "", None]), "row 2, field text: is null; write or remove the text"),
        (pa.array([1, 2]), "column text holds int64, expected string; set covariance.field"),
        (
            pa.array([b"a", b"b\xff"]).view(pa.string()),
            "row 1, field text: not valid UTF-8 at byte 1 of the cell; write it as UTF-8",
        ),
    ],
)
def test_bad_columns(tmp_path: Path, column: pa.Array, message: str) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(InputError) as caught:
        read_all(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    with pytest.raises(InputError, match=r"has no column body; its columns are text; set covarian"):
        read_all(path, "body")


@pytest.mark.parametrize("name", ["c.txt", "c.json", "c.JSONL", "c.parquet"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no such file; correct covariance\.corpus"):
        read_all(tmp_path / name)


def test_real_corpus(shared: Path) -> None:
    path = shared / "data" / "counterfact_corpus.json"
    texts = json.loads(path.read_text(encoding="utf-8"))
    drawn = read_corpus(str(path), field="text", samples=1000, seed=3)
    assert drawn == random.Random(3).sample(texts, 1000)
